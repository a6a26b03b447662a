"""A coverage-guided fuzzer of parser, checker and compiler, for hand: needs `pip install atheris`.

    python tests/fuzz/harness.py CORPUS -max_total_time=600 -timeout=60 -len_control=0 -max_len=1000

Bytes are choices in the grammar of `programs.py`; where the last one is odd, those before it are the text itself. An
empty CORPUS is filled: with the examples as texts, and with long lists of choices, which libFuzzer is slow to grow.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
with atheris.instrument_imports(include=["attnc"]):
    from tests.fuzz.outcome import outcome
    from tests.fuzz.programs import Programs


def one(data: bytes) -> None:
    """Takes one input through the compiler; what it raises is a finding."""
    found = atheris.FuzzedDataProvider(data)
    if found.ConsumeBool():
        text = found.ConsumeUnicodeNoSurrogates(len(data))
    else:
        text = Programs(lambda count: found.ConsumeIntInRange(0, count - 1)).program()
    try:
        outcome(text)
    except BaseException:
        print(text)
        raise


def fill(corpus: Path) -> None:
    """Inputs to begin with."""
    draw = Random(0)
    for file in (ROOT / "examples").glob("*.attn"):
        (corpus / file.stem).write_bytes(file.read_bytes() + b"\1")
    for number in range(200):
        (corpus / f"choices{number}").write_bytes(draw.randbytes(draw.choice((40, 120, 300))) + b"\0")


def main() -> None:
    """Runs until libFuzzer's flags say stop."""
    corpus = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    if corpus is not None and corpus.is_dir() and not any(corpus.iterdir()):
        fill(corpus)
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
