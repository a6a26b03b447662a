"""Scans as parallel recurrences: the recognised form against the scan, position by position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attnc.compiler.build import build
from attnc.compiler.ir import Graph, Node, text, walk
from attnc.compiler.recurrence import Read, Recognised, Unrecognised, recognise
from attnc.compiler.scans import scan_names
from attnc.compiler.simplify import simplify
from attnc.dsl.check import check
from attnc.dsl.source import Source
from tests.compiler.positions import LENGTH, World

D, E = 3, 2
HEADER = """pattern probe:
    input g: real[b, h, t]
    input c: real[b, h, t, d]
    input beta: real[b, h, t]
    input a: real[b, h, t, d]
    input w: real[b, h, t, d]
    input u: real[h, d]
"""


def scan_of(*steps: str) -> tuple[Graph, Node]:
    """The scan node of some steps, simplified."""
    lines = "\n".join(f"        {step}" for step in steps)
    pattern = check(Source("probe.attn", f"{HEADER}    scan t:\n{lines}\n"))["probe"]
    graph = Graph()
    out = simplify(graph, build(graph, pattern))
    (scan,) = [node for node in walk(out) if node.op == "scan"]
    return graph, scan


def world() -> World:
    random = np.random.default_rng(3)
    tensors: dict[str, Any] = {name: random.normal(size=(LENGTH, D)) for name in ("q", "k", "a", "w")}
    tensors |= {"v": random.normal(size=(LENGTH, E)), "u": random.normal(size=D), "c": -random.random((LENGTH, D))}
    tensors |= {"g": -random.random(LENGTH), "beta": random.random(LENGTH)}
    return World(tensors, {"scale": 0.5})


class Stepping(World):
    """A world in which states have values."""

    states: dict[tuple[str, int], Any]

    def at(self, node: Node, **positions: int) -> Any:
        if node.op == "state":
            return self.states[node.attribute]  # type: ignore[index]
        if node.op in ("mul", "add", "sub", "div"):  # a vector meets a matrix along the matrix's first axis
            x, y = (self.at(arg, **positions) for arg in node.args)
            most = max(np.ndim(x), np.ndim(y))
            x, y = (
                np.reshape(one, np.shape(one) + (1,) * (most - np.ndim(one))) if np.ndim(one) else one for one in (x, y)
            )
            return {"mul": np.multiply, "add": np.add, "sub": np.subtract, "div": np.divide}[node.op](x, y)
        return super().at(node, **positions)


def stepped(scan: Node) -> list[Any]:
    """The results of a scan, one position after the other."""
    at = Stepping(world().tensors, world().parameters)
    _, names = scan_names(scan)
    shapes = {"d": D, "e": E}
    leaves = [node for node in walk(scan) if node.op == "state"]
    now = {
        str(node.attribute[0]): np.zeros([shapes[axis] for axis in node.type.axes])  # type: ignore[index]
        for node in leaves
    }
    results = []
    for t in range(LENGTH):
        object.__setattr__(at, "states", {(name, 0): value for name, value in now.items()})
        counts = dict.fromkeys(now, 0)
        for name, value in zip(names, scan.args, strict=False):
            counts[str(name)] += 1
            at.states[str(name), counts[str(name)]] = at.at(value, t=t)
        results.append(at.at(scan.args[-1], t=t))
        now = {name: at.states[name, counts[name]] for name in now}
    return results


def read(found: Read, at: World, i: int) -> Any:
    """One read of the recognised form, with an ordinary loop."""
    total: Any = 0.0
    for key, value in found.writes:
        state = np.zeros((D, np.size(at.at(value, j=0))))
        for t in range(i + 1):
            before = state
            if found.decay is not None:
                factor = np.exp(at.at(found.decay, t=t))
                state = state * (factor[:, None] if np.ndim(factor) else factor)
            if found.left is not None and found.right is not None:
                state = state + np.outer(at.at(found.left, j=t), at.at(found.right, j=t) @ before)
            state = state + np.outer(at.at(key, j=t), at.at(value, j=t))
        total = total + at.at(found.query, i=i) @ state
    return total


def recognised(found: Recognised, i: int) -> Any:
    at = world()
    tensors = dict(at.tensors)
    for one in found.reads:
        array = np.zeros((LENGTH, *np.shape(read(one, at, i))))
        array[i] = read(one, at, i)
        tensors[str(one.place.attribute)] = array
    return World(tensors, at.parameters).at(found.result, i=i)


DELTA = "S = S + outer(k, beta * (v - k @ S))"
FORMS = {
    "a sum": (["S = S + outer(k, v)", "out = q @ S"], "none"),
    "a decay, read after": (["S = exp(g) * S + outer(k, v)", "out = q * scale @ S"], "none"),
    "a decay by channel, read before, with a bonus": (
        ["out = q @ S + (q @ (u * k)) * v", "S = exp(c) * S + outer(k, v)"],
        "none",
    ),
    "the bonus inside of the read": (["out = q @ (S + outer(u * k, v))", "S = exp(c) * S + outer(k, v)"], "none"),
    "a gate": (["f = sigmoid(a)", "S = f * S + outer((1 - f) * k, v)", "out = q @ S"], "none"),
    "a decay that divides": (["S = S / exp(-g) + outer(k, v)", "out = q @ S"], "none"),
    "a decay by steps": (["S = exp(g) * S", "S = exp(c) * S + outer(k, v)", "out = q @ S"], "none"),
    "two writes": (["S = exp(g) * S + outer(k, v)", "S = S - outer(a, 2 * v)", "out = q @ S"], "none"),
    "a normaliser": (
        ["S = exp(g) * S + outer(k, v)", "z = exp(g) * z + k", "out = q @ S / max(abs(q @ z), 1)"],
        "none",
    ),
    "two reads, and maths of them": (
        ["S = exp(g) * S + outer(k, v)", "out = tanh(q @ S) * sigmoid(a @ S) + v"],
        "none",
    ),
    "the delta rule": ([DELTA, "out = q * scale @ S"], "change"),
    "a decay, then the delta rule": (["S = exp(g) * S", DELTA, "out = q @ S"], "change"),
    "a decay by channel, then the delta rule": (["S = exp(c) * S", DELTA, "out = q @ S"], "change"),
    "a decay and a change of rank one": (
        ["S = exp(c) * S + outer(w, a @ S) + outer(k, v)", "out = q @ S"],
        "change",
    ),
    "a change read before it": (["out = q @ S", "S = exp(c) * S + outer(w, a @ S) + outer(k, v)"], "change"),
    "a change read in between": (["S = exp(g) * S", "out = q @ S", DELTA], "change"),
    "the same key twice": ([DELTA, DELTA, "out = q @ S"], "change"),
    "a change with its sign turned": (["S = exp(g) * S - outer(k, a @ S - v)", "out = q @ S"], "change"),
}


@pytest.mark.parametrize("form", FORMS)
def test_recognised(form: str) -> None:
    steps, change = FORMS[form]
    graph, scan = scan_of(*steps)
    found = recognise(graph, scan)
    assert all((one.left is None) == (change == "none") for one in found.reads)
    assert all(
        not node.depends_on("t") or node.op in ("input", "rename") for one in found.reads for node in (one.query,)
    )
    for i, expected in enumerate(stepped(scan)):
        np.testing.assert_allclose(recognised(found, i), expected, rtol=1e-9, atol=1e-12)


def test_reads_after_and_before() -> None:
    """A read before the update is the read after the update of the position before: keys and decays move by one."""
    graph, scan = scan_of("out = q @ S", "S = exp(g) * S + outer(k, v)")
    (one,) = recognise(graph, scan).reads
    assert text(one.writes[0][0]).startswith("%0: real[b, h, j; d] = shift[j](k, sub(j, 1))")
    assert one.decay is not None
    assert text(one.decay).startswith("%0: real[b, h, t] = shift[t](g, sub(t, 1))")
    graph, scan = scan_of("S = exp(g) * S + outer(k, v)", "out = q @ S")
    (one,) = recognise(graph, scan).reads
    assert text(one.writes[0][0]) == "return k"


OTHERS = {
    "a nonlinear state": (["S = tanh(S) + outer(k, v)", "out = q @ S"], "`tanh`", "tanh(S)"),
    "a decay of unknown sign": (["S = beta * S + outer(k, v)", "out = q @ S"], "positive", None),
    "a state times itself": (["S = (k @ S) @ v * S + outer(k, v)", "out = q @ S"], "depends on it", None),
    "two states in one": (
        ["S = S + outer(k, v)", "R = R + outer(k, q @ S)", "out = q @ R"],
        "depend on one another",
        None,
    ),
    "two keys": (
        [DELTA, "S = S + outer(a, beta * (v - a @ S))", "out = q @ S"],
        "rank 2",
        None,
    ),
    "a channel of the value": (["S = S + outer(k, v + v * (k @ S))", "out = q @ S"], "by a number", None),
    "a function of a read": (["S = S + outer(k, v - tanh(k @ S))", "out = q @ S"], "`tanh`", "tanh(k @ S)"),
    "two states in one product": (
        ["S = S + outer(k, v)", "R = exp(g) * R + outer(k, v)", "out = q @ (S - R)"],
        "several states",
        None,
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_unrecognised_with_a_reason_and_a_place(case: str) -> None:
    steps, reason, where = OTHERS[case]
    graph, scan = scan_of(*steps)
    with pytest.raises(Unrecognised) as raised:
        recognise(graph, scan)
    assert reason in raised.value.reason
    if where is not None:
        assert raised.value.node.span is not None
        assert raised.value.node.span.text == where
