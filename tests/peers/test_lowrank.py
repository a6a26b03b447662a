"""Low-rank attention against the public packages that implement it, with their inputs and weights carried over.

Deviations, each held to what both mean: nystrom-attention takes the two maxima of the first iterate over the whole
batch and all heads (here one of each), pads on the left (here the length is a multiple), and adds a convolution (off).
agent-attention-pytorch has talking heads and gates (off), and scales the agents beforehand. linformer keeps (N, r)
projections. DeepSeek's attention expands the latents into keys and values, which attnc may or may not do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnc

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the packages


def pattern(name: str) -> Any:
    return attnc.load(EXAMPLES / f"{name}.attn").patterns[name]


def heads(x: Tensor, count: int) -> Tensor:
    """(B, N, H * D) as (B, H, N, D)."""
    split: Tensor = x.unflatten(-1, (count, -1))
    return split.transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """(B, H, N, D) as (B, N, H * D)."""
    return x.transpose(1, 2).flatten(2)


def unprojected(layer: nn.Linear) -> None:
    """Makes an output projection the identity."""
    assert layer.in_features == layer.out_features
    with torch.no_grad():
        layer.weight.copy_(torch.eye(layer.in_features))
        if layer.bias is not None:
            layer.bias.zero_()


@pytest.mark.parametrize("length", [40, 29])
def test_linformer(length: int) -> None:
    peer = pytest.importorskip("linformer.linformer").LinformerSelfAttention(32, 40, k=8, heads=4).double()
    unprojected(peer.to_out)
    x = torch.randn(2, length, 32, dtype=torch.float64)
    q, k, v = (heads(project(x), 4) for project in (peer.to_q, peer.to_k, peer.to_v))
    e, f = (one[:length].T for one in (peer.proj_k, peer.proj_v))
    torch.testing.assert_close(merged(pattern("linformer")(q, k, v, E=e, F=f)), peer(x))


def test_nystrom() -> None:
    module = pytest.importorskip("nystrom_attention.nystrom_attention")
    peer = module.NystromAttention(16, dim_head=16, heads=1, num_landmarks=6, residual=False).double()
    unprojected(peer.to_out[0])
    x = torch.randn(1, 48, 16, dtype=torch.float64)
    q, k, v = (heads(part, 1) for part in peer.to_qkv(x).chunk(3, -1))
    torch.testing.assert_close(merged(pattern("nystrom")(q, k, v, landmarks=6)), peer(x))


def test_agent() -> None:
    module = pytest.importorskip("agent_attention_pytorch.agent_attention_pytorch")
    peer = module.AgentSelfAttention(
        24, num_agent_tokens=5, dim_head=8, heads=3, talking_heads=False, gate=False
    ).double()
    unprojected(peer.to_out[1])
    with torch.no_grad():
        peer.agent_tokens.normal_()
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    q, k, v = peer.to_qkv(x)
    torch.testing.assert_close(merged(pattern("agent")(q, k, v, agents=peer.agent_tokens)), peer(x))


def test_mla(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3Attention,
        DeepseekV3RotaryEmbedding,
        apply_rotary_pos_emb_interleave,
    )

    config = DeepseekV3Config(
        hidden_size=4 * 12,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=20,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        num_hidden_layers=1,
        attn_implementation="eager",
    )
    peer = DeepseekV3Attention(config, 0).double().eval()
    unprojected(peer.o_proj)
    seen: dict[str, Tensor] = {}
    expand = peer.expand_kv

    def watched(latent: Tensor, rotated: Tensor) -> Any:
        seen["latent"], seen["k_r"] = latent, rotated
        return expand(latent, rotated)

    monkeypatch.setattr(peer, "expand_kv", watched)
    length = 19
    x = torch.randn(2, length, 48, dtype=torch.float64)
    place = torch.arange(length)[None]
    rotation = DeepseekV3RotaryEmbedding(config)(x, place)
    mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    with torch.no_grad():
        expected, _ = peer(x, rotation, mask)
        q = heads(peer.q_proj(x), 4)
        q_r, _ = apply_rotary_pos_emb_interleave(q[..., 16:], q[..., 16:], *rotation)
        w_k, w_v = peer.kv_b_proj.weight.view(4, 16 + 12, 20).split([16, 12], 1)
        found = pattern("mla")(
            q[..., :16], seen["latent"], None, w_k=w_k, w_v=w_v, q_r=q_r, k_r=seen["k_r"], scale=float(peer.scaling)
        )
    torch.testing.assert_close(merged(found), expected)
