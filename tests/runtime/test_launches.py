"""What `explain` says of launches: which steps share one, and why others do not."""

from __future__ import annotations

import torch

import attnc

HYBRID = """pattern p(n: int = 2, window: int = 8):
    input gate: real[b, h, i]
    near = softmax[j](q @ k * scale where 0 <= i - j < window) @ v
    far = sum[j]((q @ k) * scale * v where j <= i)
    out = if h < n then sigmoid(gate) * near + far else far
"""
SOFTMAXES = """pattern p:
    near = softmax[j](q @ k * scale where 0 <= i - j < 600) @ v
    far = merge(softmax[j](q @ k * scale where j < 4) @ v, softmax[j](q @ k * scale where j <= i - 600) @ v)
    out = near + far
"""


def launches(text: str, length: int, **inputs: torch.Tensor) -> list[str]:
    pattern = attnc.compile(text).p
    q, k, v = torch.zeros(3, 1, 4, length, 8)
    lines = pattern.explain(q, k, v, **inputs).split("\n\n")
    found = [part.splitlines() for part in lines if part.startswith("launches on a GPU")]
    return [line.strip() for line in found[0][1:]] if found else []


def test_heads_and_why_no_launch_is_shared() -> None:
    # 2 of 4 heads of 16 rows with 100 keys (8 a row, fewer at first), k and v of those heads alone
    assert launches(HYBRID, 16, gate=torch.zeros(1, 4, 16)) == [
        "0_attention: its own, on heads 0 <= h < n: with 2_carry it would load 1,024 bytes of bfloat16 less, with 6 "
        "operations for each; no kernel holds the sums of both",
        "2_carry: its own: its state runs along the keys, while 0_attention takes them a tile of rows at a time",
        "3_out: joins 0_attention, 2_carry by one kernel of rows, which reads each once; not inside of a branch's "
        "kernel, since gradients ask for what each branch left",
    ]


def test_products_outweigh_loads() -> None:
    lines = launches(SOFTMAXES, 700)
    assert "operations for each, and from 200 on it waits for those" in lines[0]
    assert lines[1].startswith("1_attention: one for each of 2 sets of keys, joined by log-sum-exp: with 0_attention")
    assert "joins 0_attention, 1_attention by one kernel of rows, which reads each once" in lines[2]


def test_one_heavy_step_has_nothing_to_share() -> None:
    assert launches("pattern p:\n    out = 2 * (softmax[j](q @ k * scale where j <= i) @ v)\n", 5) == []
