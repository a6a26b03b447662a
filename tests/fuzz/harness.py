"""A coverage-guided fuzzer of parser, checker and compiler, for hand: needs `pip install atheris`.

    python tests/fuzz/harness.py CORPUS -max_total_time=600 -timeout=60

Bytes are choices in the grammar of `programs.py`; where the first one is odd, they are the text itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
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


def main() -> None:
    """Runs until libFuzzer's flags say stop."""
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
