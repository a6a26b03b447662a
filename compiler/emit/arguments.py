"""The arguments of a kernel, in order, and what each stands for: the launcher fills them in by role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnc.compiler.emit.expressions import SIZES, array_name, parameter_name
from attnc.compiler.emit.rows import row_nodes
from attnc.compiler.ir import Node, walk
from attnc.compiler.plan import Derived, Diagonals, Domain, Grid, Listed, Plan, Stepped

PLAIN, ROW_VIEW = -1, -2  # views in the order of the tensor, and by the step of the row tiles
TAILED = ("q", "k")  # tensors that may be cut into two blocks of columns
TAIL = "_tail"
LAYOUTS = {
    "q": "bhnd",
    "k": "bhnd",
    "k_low": "bhnd",
    "v": "bhne",
    "o": "bhne",
    "do": "bhne",
    "dq": "bhnd",
    "dk": "bhnd",
    "dv": "bhne",
}


@dataclass(frozen=True)
class Argument:
    """One kernel argument.

    roles: `tensor` (q k v o lse, parts and schedule), `stride` (attribute tensor, slot), `size` (attribute),
    `view` (a tensor descriptor of q, k, v, do or of statistics: attribute; slot: the key set whose step it follows,
    or one of PLAIN and ROW_VIEW),
    `parameter` (attribute), `array` (an input or table: attribute, axes), `array_stride`, `array_length` and
    `array_group` (attribute, slot). Only a `specialised` argument's value is looked at by Triton's own
    compilation, so one compilation serves all lengths and parameters.
    """

    name: str
    role: str
    attribute: str = ""
    slot: int = 0
    axes: tuple[str, ...] = ()
    specialised: bool = False


@dataclass(frozen=True)
class Signature:
    """What a kernel is given: strided tensors, flat buffers, which tensors stay in rows and which are streamed.

    `statistics`: buffers (B, H, N) of which tiles are streamed, too.
    """

    tensors: tuple[str, ...]
    buffers: tuple[str, ...]
    rows: tuple[str, ...]
    streamed: tuple[str, ...]
    statistics: tuple[str, ...] = ()


def kernel_arguments(
    plan: Plan,
    expressions: Sequence[Node],
    domain: Domain,
    signature: Signature,
    *,
    tails: bool = False,
    apart: bool = False,
) -> tuple[Argument, ...]:
    """The arguments of one kernel.

    `tails`: q and k have views of a second block of columns. `apart`: no descriptor has a tile of the rows.
    """

    def blocks(names: Sequence[str]) -> list[str]:
        return [*names, *(name + TAIL for name in names if tails and name in TAILED)]

    tensors = [Argument(name, "tensor", name, specialised=True) for name in (*signature.tensors, *signature.buffers)]
    strides = [
        Argument(f"{tensor}_s{axis}", "stride", tensor, slot, specialised=True)
        for tensor in signature.tensors
        for slot, axis in enumerate(LAYOUTS[tensor])
    ]
    views = []
    if domain.rows.period is None and domain.rows.listed is None and not apart:
        views = [Argument(f"{x}_view", "view", x, ROW_VIEW, specialised=True) for x in blocks(signature.rows)]
    for number, key_set in enumerate(domain.key_sets):
        if key_set.walk is None or isinstance(key_set.walk, Stepped):
            slot = PLAIN if key_set.walk is None else number
            suffix = view_suffix(slot)
            streamed = blocks((*signature.streamed, *signature.statistics))
            views += [Argument(f"{x}_view{suffix}", "view", x, slot, specialised=True) for x in streamed]
    sizes = [Argument(name, "size", name) for name in ("B", "H", "N", "M", "OFFSET", "GROUP")]
    # Copies of vectors are as wide as what divides the limit that they are held against
    sizes[4:4] = [Argument(name, "size", name, specialised=True) for name in ("D", "E")]
    sizes += [Argument("MEMBER", "size", "MEMBER")] if domain.rows.listed is not None else []
    nodes = list(walk(*expressions, *walk_nodes(domain)))
    used = {str(node.attribute) for node in nodes if node.op == "parameter"}
    others = sorted({str(node.attribute) for node in nodes if node.op == "size"} - set(SIZES))
    sizes += [Argument(f"size_{name}", "size", name) for name in others]
    parameters = [Argument(parameter_name(name), "parameter", name) for name in sorted(used)]
    arrays = [one for array in array_layouts(plan, nodes, domain) for one in array_arguments(*array)]
    return (*tensors, *strides, *views, *sizes, *parameters, *arrays)


def view_constant(argument: Argument) -> str:
    """The constant that says whether a view's descriptor is there."""
    if argument.slot == ROW_VIEW:
        return "VIEW_Q"
    kind = "VIEW" if argument.attribute.removesuffix(TAIL) in LAYOUTS else "VIEW_S"
    return f"{kind}{view_suffix(argument.slot)}"


def view_suffix(slot: int) -> str:
    """Distinguishes the views of one tensor."""
    return "" if slot < 0 else str(slot)


def walk_nodes(domain: Domain) -> list[Node]:
    """Nodes that the walks and the row tiles of a domain hold."""
    found: list[Node | None] = [*row_nodes(domain.rows).values()]
    for key_set in domain.key_sets:
        match key_set.walk:
            case Stepped(phase, step):
                found += [phase, step]
            case Grid():
                grid = key_set.walk
                found += [grid.period, grid.low.lo, grid.low.hi]
                found += [grid.high_phase, grid.high_step, grid.low_phase, grid.low_step]
            case Listed():
                found += [key_set.walk.width, key_set.walk.offset]
            case Diagonals():
                found.append(key_set.walk.offset)
    return [node for node in found if node is not None]


def array_layouts(plan: Plan, nodes: Sequence[Node], domain: Domain) -> list[tuple[str, str, tuple[str, ...]]]:
    """(argument name, attribute, axes) of every input and table that the kernel reads."""
    found: dict[str, tuple[str, str, tuple[str, ...]]] = {}
    layouts = {one.name: one.axes for one in plan.inputs}
    for node in nodes:
        attribute = str(node.attribute)
        if node.op == "input" and attribute not in ("q", "k", "v"):
            found[attribute] = (array_name(node), attribute, layouts[attribute])
        if node.op == "derived":
            found[attribute] = (array_name(node), attribute, (*node.type.ordered_indices(), *node.type.axes))
    for table in domain_tables(domain):
        derived = next(one for one in (*plan.derived, *plan.transposed_derived) if table.startswith(f"{one.name}."))
        found[table] = (f"t_{table.replace('.', '_')}", table, table_axes(derived, table))
    return list(found.values())


def domain_tables(domain: Domain) -> list[str]:
    """The derived tables that list keys or rows."""
    walks = [key_set.walk for key_set in domain.key_sets]
    tables: list[str | None] = [domain.rows.listed.table] if domain.rows.listed else []
    for walked in walks:
        if isinstance(walked, Listed):
            tables += [walked.table, walked.rank, walked.starts]
        elif isinstance(walked, Diagonals):
            tables += [walked.table, walked.rank]
    return [table for table in dict.fromkeys(tables) if table is not None]


def table_axes(derived: Derived, table: str) -> tuple[str, ...]:
    """The axes of one part of a derived table that lists positions."""
    last = "position" if table.endswith((".rank", ".starts")) else "entry"
    if derived.kind == "listing":
        return (*derived.args[0].type.ordered_indices(), last)
    return ("row_block", last) if derived.kind == "block_list" else (last,)


def array_arguments(name: str, attribute: str, axes: tuple[str, ...]) -> list[Argument]:
    """Pointer, strides, lengths and, where it has heads, how many query heads share one."""
    pointer = Argument(name, "array", attribute, axes=axes)
    strides = [Argument(f"{name}_s{slot}", "array_stride", attribute, slot) for slot in range(len(axes))]
    lengths = [Argument(f"{name}_n{slot}", "array_length", attribute, slot) for slot in range(len(axes))]
    group = [Argument(f"{name}_group", "array_group", attribute, axes.index("h"))] if "h" in axes else []
    return [pointer, *strides, *lengths, *group]
