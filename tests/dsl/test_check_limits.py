"""How large a pattern may be, and the prelude."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from attnc.dsl.builder import MAX_DEPTH, MAX_TERMS
from attnc.dsl.builtins import FUNCTIONS
from attnc.dsl.check import check
from attnc.dsl.diagnostics import AttnError
from attnc.dsl.modules import prelude
from attnc.dsl.source import Source
from attnc.dsl.terms import Pattern, Term


def one(body: str, parameters: str = "") -> Pattern:
    """The pattern `p(parameters)` with a body."""
    text = f"pattern p{f'({parameters})' if parameters else ''}:\n    " + body.replace("\n", "\n    ") + "\n"
    return check(Source("p.attn", text))["p"]


def terms(pattern: Pattern) -> Iterator[Term]:
    """Every term of a pattern once."""
    seen: set[Term] = set()
    stack = [pattern.out]
    while stack:
        term = stack.pop()
        if term in seen:
            continue
        seen.add(term)
        yield term
        stack += term.args
        stack += [step for _, step in term.block.steps] if term.block else []


def forms(pattern: Pattern) -> list[str]:
    return sorted(term.form for term in terms(pattern))


def test_functions_that_double_are_linear() -> None:
    functions = "\n".join(f"f{n}(x) = f{n - 1}(x) + f{n - 1}(x)" for n in range(1, 30))
    assert forms(one(f"f0(x) = x\n{functions}\nout = f29(q)")).count("add") == 29


def test_too_many_operations() -> None:
    functions = "\n".join(f"f{n}(x) = f{n - 1}(x + 1) + f{n - 1}(x + 2)" for n in range(1, 20))
    with pytest.raises(AttnError, match=f"more than {MAX_TERMS} operations"):
        one(f"f0(x) = x\n{functions}\nout = f19(q)")


def test_too_long_a_chain() -> None:
    steps = "\n".join(f"x{n} = x{n - 1} + 1" for n in range(1, MAX_DEPTH + 1))
    with pytest.raises(AttnError, match=f"chain of more than {MAX_DEPTH}"):
        one(f"x0 = q\n{steps}\nout = x{MAX_DEPTH}")


def test_a_long_sum_is_no_deep_nesting() -> None:
    assert forms(one("out = q" + " + q" * 150)).count("add") == 150


def test_too_deep_a_call() -> None:
    functions = "\n".join(f"f{n}(x) = -(-f{n - 1}(x))" for n in range(1, 60))
    with pytest.raises(AttnError, match="inside one another"):
        one(f"f0(x) = x\n{functions}\nout = f59(q)")


def test_the_prelude_checks() -> None:
    calls = {
        "causal": "causal()", "window": "window(3)", "near": "near(3)", "dilated": "dilated(3, 2)",
        "block_local": "block_local(3)", "same": "same(doc)", "unit": "unit(q) @ unit(k) > 0",
        "rms_norm": "mean[e](rms_norm(v, 1e-6)) > 0", "pi": "pi() > 3",
    }  # fmt: skip
    assert calls.keys() == prelude().functions.keys()
    for call in calls.values():
        one(f"input doc: int[b, t]\nout = softmax[j](q @ k where {call}) @ v")


def test_the_prelude_redefines_no_function_of_the_language() -> None:
    assert not FUNCTIONS.keys() & prelude().functions.keys()
