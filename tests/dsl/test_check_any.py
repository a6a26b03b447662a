"""Whatever stands in a text, the checker gives patterns or located errors, and nothing else."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.dsl.check import check
from attnc.dsl.diagnostics import AttnError, Diagnostic, render
from attnc.dsl.source import Source

NAMES = "q k v i j h t scale 1 2 0.5 true g g[i] g[j] doc[i] x table N D X m s.stop s.index picked Z f"
INDICES = ["j", "i", "s", "c", "d", "e", "t", "h", "m", "j in s", "j in c", "i in a", "c in s", "3"]
BINARY = ["+", "-", "*", "/", "//", "%", "**", "@", "<", "<=", "==", "!=", "in", "not in", "and", "or"]
REDUCTIONS = ["softmax", "normalize", "sum", "mean", "max", "min", "cumsum", "argmax", "matrix"]
SELECTIONS = ["topk", "threshold", "mass", "concat"]
FUNCTIONS = {"exp": 1, "floor": 1, "abs": 1, "max": 2, "clamp": 3, "outer": 2, "concat": 2, "transpose": 1, "merge": 2}
FUNCTIONS |= {"uniform": 2, "group_sum": 1, "orthogonal_gaussian": 3, "real": 1, "other": 3, "f": 1, "window": 1}

HEAD = """
pattern other:
    out = softmax[j](q @ k) @ v
pattern p:
    input g: real[b, h, t]
    input x: real[b, h, i, m]
    input table: real[h, n]
    input doc: int[b, t]
    axis s = blocks(j, 4)
    axis c = blocks(j, 4, 2)
    axis a = segments(i, 3)
    f(y) = y + 1
    Z = q
    picked = topk[s](q @ mean[j in s](k), 2)
"""


def _wider(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    calls = [
        st.builds("{}({})".format, st.just(name), st.lists(inner, min_size=count, max_size=count).map(", ".join))
        for name, count in FUNCTIONS.items()
    ]
    where = inner.map(lambda condition: f" where {condition}") | st.just("")
    return st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(BINARY), inner),
        st.builds("(if {} then {} else {})".format, inner, inner, inner),
        st.builds("{}[{}]({}{})".format, st.sampled_from(REDUCTIONS), st.sampled_from(INDICES), inner, where),
        st.builds(
            "{}[{}]({}, {}{})".format, st.sampled_from(SELECTIONS), st.sampled_from(INDICES), inner, inner, where
        ),
        st.builds("x[{}]".format, inner),
        st.builds("(-{})".format, inner),
        *calls,
    )


EXPRESSIONS = st.recursive(st.sampled_from(NAMES.split()), _wider, max_leaves=12)


def outcome(text: str) -> tuple[Diagnostic, ...]:
    """The errors of a text; none where it checks."""
    try:
        patterns = check(Source("p.attn", text))
    except AttnError as error:
        return error.diagnostics
    assert patterns["p"].out.type.axes
    return ()


@settings(max_examples=150, deadline=None)
@given(state=EXPRESSIONS, step=EXPRESSIONS, out=EXPRESSIONS)
def test_any_text_gives_patterns_or_located_errors(state: str, step: str, out: str) -> None:
    scan = f"    scan t:\n        S = {state}\n        S = S + {step}\n"
    for diagnostic in outcome(f"{HEAD}{scan}    repeat 3:\n        Z = {step}\n    out = {out}\n"):
        span = diagnostic.span
        assert 0 <= span.start <= span.stop <= len(span.source.text)
        assert render(diagnostic).startswith(f"error[{diagnostic.code}]: ")
