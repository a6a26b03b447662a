"""The rules for states: sums over keys whose weights separate, and scans, become `Carry` and `Recur` steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnc.compiler.algebra import Algebra
from attnc.compiler.associate import Associated, Declined, Exponential, associate, finish
from attnc.compiler.build import unlowered
from attnc.compiler.composition import Attend, Carry, Extent, Extreme, Near, Recur, Sequential
from attnc.compiler.decompose import Decomposer
from attnc.compiler.extents import Reach
from attnc.compiler.features import Score, end_to_end
from attnc.compiler.ir import Graph, Node, substitute, walk
from attnc.compiler.recurrence import Read, Recognised, Unrecognised, reads_state, recognise
from attnc.compiler.reindex import renamed
from attnc.compiler.separate import is_mixed
from attnc.dsl.types import Base, Type

ROWS = Type(Base.REAL, frozenset("bhi"))


def carry_sums(at: Decomposer, node: Node) -> Node | None:
    """`normalize[j](w where ..) @ v`, `sum[j](w * v where ..)`, `w @ v` with weights that separate."""
    found = associate(at.graph, Algebra(at.graph), node)
    if found is None:
        return None
    if isinstance(found, Declined):
        raise unlowered(
            found.node,
            f"a sum over keys whose weights do not separate ({found.reason})",
            "a softmax takes any score; other weights must be sums of products of values of the row and of the key",
        )
    return carried(at, found)


def carried(at: Decomposer, found: Associated) -> Node:
    """The steps of a separated sum; the node that reads its result."""
    if found.parts:
        where = f"`{found.node.span.text}`: " if found.node.span else ""
        at.notes.append(f"{where}weights that separate into values of the row and of the key: no pair is formed")
    sums, totals = [], []
    for part in found.parts:
        query, key, value = (at.array(one) for one in (part.query, part.key, part.value))
        decay = None if part.decay is None else at.array(part.decay)
        name = at.fresh("carry")
        total = at.fresh("total") if found.options is not None else None
        near = None if part.score is None else near_pairs(at, part.score)
        at.steps.append(Carry(name, query, key, value, extent_of(at, part.reach), decay, total, near))
        made = at.declare(name, Type(Base.REAL, frozenset("bhi"), part.value.type.axes))
        sums.append(made if part.times is None else at.graph.make("mul", made, part.times))
        if total is not None:
            totals.append(at.declare(total, ROWS))
    for exponential in found.exponentials:
        made, factor = exponential_sum(at, exponential)
        sums.append(at.graph.make("mul", made, factor))
        totals.append(factor)
    return at.lower(finish(at.graph, found, sums, totals))


def near_pairs(at: Decomposer, score: Score) -> Near:
    """A score with its arrays made."""
    return Near(at.array(score.query), at.array(score.key), score.coefficients)


def exponential_sum(at: Decomposer, found: Exponential) -> tuple[Node, Node]:
    """The softmax of the scores with its values, and what it was divided by: exp(lse + shift)."""
    graph = at.graph
    type = Type(Base.REAL, found.score.type.indices | frozenset("bhij"))
    weights = graph.make("softmax", found.score, found.condition, type=type, attribute=("j", None))
    result = Type(Base.REAL, frozenset("bhi"), found.value.type.axes)
    made = at.lower(graph.make("dot", weights, found.value, type=result, attribute="j", span=found.score.span))
    exponent = at.declare(attention_of(at, made).lse, ROWS)
    if found.shift is not None:
        exponent = graph.make("add", exponent, found.shift)
    return made, graph.make("exp", exponent)


def attention_of(at: Decomposer, made: Node) -> Attend:
    """The step that left an attention's output."""
    return next(one for one in at.steps if isinstance(one, Attend) and one.name == made.attribute)


def extremes(at: Decomposer, node: Node) -> Node | None:
    """`max[j](score where condition)` and `min` over the keys of a row."""
    if node.op not in ("max", "min") or node.attribute != ("j", None) or not is_mixed(node.args[0]):
        return None
    graph, (body, condition) = at.graph, node.args
    type = Type(Base.REAL, body.type.indices | frozenset("bhij"))
    weights = graph.make("softmax", body, condition, type=type, attribute=("j", None), span=node.span)
    nothing = end_to_end(graph, [graph.literal(1.0)])
    output = Type(Base.REAL, frozenset("bhi"), nothing.type.axes)
    made = at.lower(graph.make("dot", weights, nothing, type=output, attribute="j", span=node.span))
    attend = attention_of(at, made)
    name = at.fresh("extreme")
    at.steps[at.steps.index(attend)] = Extreme(name, attend, node.op == "max")
    return at.declare(name, ROWS)


def extent_of(at: Decomposer, reach: Reach) -> Extent:
    """A reach with its arrays made."""
    return Extent(reach.kind, reach.amount, None if reach.same is None else at.array(reach.same))


def run_scans(at: Decomposer, node: Node) -> Node | None:
    """A scan over tokens, read at the queries."""
    if node.op != "rename" or node.args[0].op != "scan":
        return None
    (scan,) = node.args
    try:
        found = recognise(at.graph, scan)
    except Unrecognised as reason:
        return sequential(at, scan, reason)
    found = scaled_writes(at.graph, found)
    change = any(read.left is not None for read in found.reads)
    at.notes.append(
        "the scan is linear in its state, with a decay and a change of rank one: it runs in chunks of positions"
        if change
        else "the scan is linear in its state, and a position only decays it and adds to it: it is a sum over the keys"
    )
    places = {read.place: state_reads(at, read) for read in found.reads}
    return at.lower(substitute(at.graph, found.result, places))


def scaled_writes(graph: Graph, found: Recognised) -> Recognised:
    """A number times the only read is the read of what is written that many times: values are often scaled anyway."""
    result = found.result
    if result.op != "mul" or len(found.reads) != 1:
        return found
    (read,) = found.reads
    others = [arg for arg in result.args if arg is not read.place]
    if len(others) != 1 or others[0].type.indices or others[0].type.axes:
        return found
    writes = tuple((key, graph.make("mul", value, others[0])) for key, value in read.writes)
    return replace(found, reads=(replace(read, writes=writes),), result=read.place)


def state_reads(at: Decomposer, read: Read) -> Node:
    """The reads of a state: one step for each product that is written to it, added up."""
    graph = at.graph
    result: Node | None = None
    for write in read.writes:
        query, key, value = (at.array(one) for one in (read.query, *write))
        decay = None if read.decay is None else at.array(read.decay)
        if read.left is None or read.right is None:
            name = at.fresh("carry")
            at.steps.append(Carry(name, query, key, value, Extent("lag", graph.literal(0)), decay))
        else:
            left, right = at.array(read.left), at.array(read.right)
            name = at.fresh("state")
            at.steps.append(Recur(name, query, key, value, decay, left, right))
        made = at.declare(name, read.place.type)
        result = made if result is None else graph.make("add", result, made)
    assert result is not None
    return result


def sequential(at: Decomposer, scan: Node, reason: Unrecognised) -> Node:
    """The scan step by step: what does not depend on a state is an array, the rest runs at every position."""
    where = f" (`{reason.node.span.text}`)" if reason.node.span else ""
    arrays: dict[Node, Node] = {}
    for outside in free_of_state(scan.args):
        name = at.array(outside)
        arrays[outside] = at.read(name)
    node = substitute(at.graph, scan, arrays)
    name = at.fresh("scan")
    at.steps.append(Sequential(name, node, f"{reason.reason}{where}"))
    at.notes.append(f"a scan runs one position after the other: {reason.reason}{where}")
    made = at.declare(name, scan.type)
    return renamed(at.graph, made, "t", "i")


def free_of_state(roots: Sequence[Node]) -> list[Node]:
    """The largest values below some nodes that depend on no state, but for numbers."""
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if reads_state(node):
            stack.extend(node.args)
        elif any(one.op not in ("literal", "parameter", "size") for one in walk(node)):
            found[node] = None
    return list(found)
