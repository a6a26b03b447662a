"""Conditions to key sets: which keys a row sees, in closed form.

Forward, rows are queries i and keys are j; transposed, the other way round (`Roles`).

A condition becomes a disjunction of conjunctions. Each conjunction's atoms are solved for the key: comparisons
become intervals and congruences, equal tables become intervals that a prologue reads off, memberships become
lists. Conjunctions that are plain intervals share one key set (their union is visited once); each other one
gets a walk of its own, with what earlier ones cover taken out, so that no pair counts twice. What no rule
reaches is left to the mask, and a note says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from attnc.compiler.algebra import Algebra, Congruence, Constraint, Coordinate, Interval, at_most, solve
from attnc.compiler.conditions import Conjunction, disjunction, negate, split_unequal
from attnc.compiler.ir import Graph, Node, substitute
from attnc.compiler.membership import Member, Roles, Tables
from attnc.compiler.plan import Bounds, Diagonals, Domain, Grid, KeySet, Listed, Rows, Run, Stepped, Walk
from attnc.compiler.simplify import simplify
from attnc.dsl.types import Base


@dataclass
class Keys:
    """What is known of the keys of one conjunction."""

    atoms: Conjunction
    lows: list[Node] = field(default_factory=list)
    highs: list[Node] = field(default_factory=list)
    inner_lows: list[Node] = field(default_factory=list)
    inner_highs: list[Node] = field(default_factory=list)
    exact: bool = True  # inner bounds exist
    guards: list[Node] = field(default_factory=list)
    residues: dict[Node, Congruence] = field(default_factory=dict)  # by atom
    digits: dict[Node, Interval] = field(default_factory=dict)
    members: dict[Node, Member] = field(default_factory=dict)
    opaque: list[Node] = field(default_factory=list)

    def plain(self) -> bool:
        return not (self.residues or self.digits or self.members)

    def selected(self) -> bool:
        """Whether a selection lists the keys: no other key set can leave its pairs out, so it comes last."""
        return any(member.row_block is not None for member in self.members.values())


class DomainBuilder:
    """Lowers the condition of one branch. `tables` collects the derived tables that it needs."""

    def __init__(self, graph: Graph, algebra: Algebra, tables: Tables, roles: Roles | None = None) -> None:
        self.graph = graph
        self.algebra = algebra
        self.tables = tables
        self.roles = roles or Roles.forward(graph)
        self.notes: list[str] = []

    def build(self, condition: Node) -> Domain:
        """One domain for all of the condition: every row is enumerated once."""
        keys = self.solve(condition)
        rows = self.choose_rows(keys)
        linear = [known for known in keys if self.choose_walk(known, rows) is None]
        walked = sorted((known for known in keys if known not in linear), key=Keys.selected)
        key_sets = [self.consecutive(linear)] if linear else []
        covered = [known.atoms for known in linear]
        for known in walked:
            key_set = self.subtract(known, covered, rows)
            if key_set is not None:
                key_sets.append(key_set)
            covered.append(known.atoms)
        return Domain(tuple(key_sets), rows, tuple(dict.fromkeys(self.notes)))

    # Solving

    def solve(self, condition: Node) -> list[Keys]:
        """What is known of each conjunction that is not empty for certain."""
        conjunctions = disjunction(self.graph, condition)
        keys = [known for one in conjunctions if not self.empty(known := self.solve_atoms(one))]
        for atom in dict.fromkeys(atom for known in keys for atom in known.opaque):
            where = f" ({atom.span}: `{atom.span.text}`)" if atom.span else ""
            key = self.roles.key
            self.notes.append(f"a condition{where} could not be solved for {key}: every tile it may touch evaluates it")
        return keys

    def solve_atoms(self, atoms: Conjunction) -> Keys:
        keys = Keys(atoms)
        for atom in atoms:
            self.solve_atom(keys, atom)
        return keys

    def solve_atom(self, keys: Keys, atom: Node) -> None:
        selects = atom.op == "member" and atom.args[1].type.selects is not None
        if not atom.depends_on(self.roles.key) and not selects:
            keys.guards.append(atom)
            return
        constraint = solve(self.algebra, atom, self.roles.key) or self.solve_replaced(keys, atom)
        if isinstance(constraint, Node):
            keys.guards.append(constraint)
        elif isinstance(constraint, Interval) and constraint.coordinate == Coordinate():
            keys.lows += [constraint.lo] if constraint.lo else []
            keys.highs += [constraint.hi] if constraint.hi else []
            keys.inner_lows += [constraint.lo] if constraint.lo else []
            keys.inner_highs += [constraint.hi] if constraint.hi else []
        elif isinstance(constraint, Interval):
            keys.digits[atom] = constraint
        elif isinstance(constraint, Congruence):
            keys.residues[atom] = constraint
        elif (bounds := self.tables.bounds_of(atom, self.roles)) is not None:
            outer, inner = bounds
            keys.lows.append(outer.lo)
            keys.highs.append(outer.hi)
            keys.inner_lows.append(inner.lo)
            keys.inner_highs.append(inner.hi)
        elif (member := self.tables.member(atom, self.roles.key)) is not None:
            keys.members[atom] = member
        else:
            keys.opaque.append(atom)
            keys.exact = False

    def solve_replaced(self, keys: Keys, atom: Node) -> Constraint | Node | None:
        """The atom with what other atoms say to be equal put in its place: x(key) by y(row). A guard is a node."""
        if atom.op not in ("lt", "le", "eq"):
            return None
        replaced = substitute(self.graph, atom, self.equalities([other for other in keys.atoms if other is not atom]))
        if replaced is atom:
            return None
        replaced = simplify(self.graph, replaced)
        return solve(self.algebra, replaced, self.roles.key) if replaced.depends_on(self.roles.key) else replaced

    def equalities(self, atoms: Sequence[Node]) -> dict[Node, Node]:
        """Values of the key that atoms fix: x(key) == y(row), and remainders."""
        graph, key = self.graph, self.roles.key
        found: dict[Node, Node] = {}
        for atom in atoms:
            if atom.op != "eq" or atom.args[0].type.base is not Base.INT or not atom.depends_on(key):
                continue
            sides = ((x, y) for x, y in (atom.args, atom.args[::-1]) if x.args and x.depends_on(key))
            found |= {x: y for x, y in sides if not (x.depends_on(self.roles.row) or y.depends_on(key))}
            constraint = solve(self.algebra, atom, key)
            if isinstance(constraint, Congruence):
                view = self.digit(constraint.coordinate, key)
                remainder = graph.make("mod", view, constraint.step)
                found.setdefault(remainder, graph.make("mod", constraint.phase, constraint.step))
        return found

    def digit(self, coordinate: Coordinate, index: str) -> Node:
        position = self.graph.index(index)
        if coordinate.period is None:
            return position
        return self.graph.make("floordiv" if coordinate.digit == "high" else "mod", position, coordinate.period)

    def empty(self, keys: Keys) -> bool:
        """Whether the atoms contradict each other for certain."""
        if any(at_most(self.algebra, high, low) for low in keys.lows for high in keys.highs):
            return True
        atoms = set(keys.atoms)
        return any(negate(self.graph, atom) in atoms for atom in keys.atoms)

    # Rows

    def choose_rows(self, keys: Sequence[Keys]) -> Rows:
        """Group rows so that a tile's rows share residues, lines of a grid, or the blocks of a list."""
        shared = self.shared_residues(keys)
        for known in keys:
            for member in known.members.values():
                if member.row_block is not None:
                    return Rows(period=member.row_block)
        for known in keys:
            period = self.period(known)
            if period is None:
                continue
            high = shared.get(Coordinate("high", period))
            low = shared.get(Coordinate("low", period))
            square = any(
                bound is not None and bound.depends_on(self.roles.row)
                for d in known.digits.values()
                for bound in (d.lo, d.hi)
            )
            if square or high or low:
                return Rows(period=period, high_step=high, low_step=low, square=square)
        step = shared.get(Coordinate())
        return Rows(step=step)

    def shared_residues(self, keys: Sequence[Keys]) -> dict[Coordinate, Node]:
        """Coordinates of the row that every conjunction fixes modulo the same step."""
        found: list[dict[Coordinate, Node]] = []
        for known in keys:
            row = self.roles.row
            atoms = sorted(known.atoms, key=lambda atom: atom.depends_on(self.roles.key))  # what ties both counts last
            solved = [solve(self.algebra, atom, row) for atom in atoms if atom.depends_on(row)]
            found.append({one.coordinate: one.step for one in solved if isinstance(one, Congruence)})
        if not found:
            return {}
        return {at: step for at, step in found[0].items() if all(other.get(at) is step for other in found[1:])}

    @staticmethod
    def period(keys: Keys) -> Node | None:
        """The period of the grid that the conjunction's digits lie on."""
        constraints: list[Constraint] = [*keys.digits.values(), *keys.residues.values()]
        return next((one.coordinate.period for one in constraints if one.coordinate.period is not None), None)

    # Walks

    def choose_walk(self, keys: Keys, rows: Rows) -> Walk:
        """The order in which the conjunction's keys are visited; None: consecutive, with a mask."""
        for member in keys.members.values():
            return member.walk
        period = self.period(keys)
        if period is not None:
            return self.grid(keys, period, rows)
        for residue in keys.residues.values():
            if not residue.phase.depends_on(self.roles.row) or rows.step is residue.step:
                return Stepped(residue.phase, residue.step)
            self.notes.append(
                "keys of one residue class are masked, not skipped: "
                f"not every part of the condition ties {self.roles.row} to it"
            )
        return None

    def grid(self, keys: Keys, period: Node, rows: Rows) -> Grid:
        zero = self.graph.literal(0)
        lows, highs = [zero], [period]
        for digit in keys.digits.values():
            if digit.coordinate.period is period:
                lows += [digit.lo] if digit.lo else []
                highs += [digit.hi] if digit.hi else []
        phases: dict[str, Congruence] = {}
        for residue in keys.residues.values():
            if residue.coordinate.period is not period:
                continue
            step = rows.high_step if residue.coordinate.digit == "high" else rows.low_step
            if not residue.phase.depends_on(self.roles.row) or step is residue.step:
                phases.setdefault(residue.coordinate.digit, residue)
        high, low = phases.get("high"), phases.get("low")
        return Grid(
            period,
            Bounds(self.largest(lows), self.smallest(highs)),
            high.phase if high else None,
            high.step if high else None,
            low.phase if low else None,
            low.step if low else None,
        )

    def walked_exactly(self, keys: Keys, walk: Walk) -> set[Node]:
        """Atoms that the walk itself enforces, so that its mask need not."""
        if isinstance(walk, Listed | Diagonals):
            return {atom for atom, member in keys.members.items() if member.walk is walk}
        classes: dict[Coordinate, tuple[Node | None, Node | None]] = {}
        if isinstance(walk, Stepped):
            classes[Coordinate()] = walk.phase, walk.step
        if isinstance(walk, Grid):
            classes[Coordinate("high", walk.period)] = walk.high_phase, walk.high_step
            classes[Coordinate("low", walk.period)] = walk.low_phase, walk.low_step
        enforced = {
            atom
            for atom, residue in keys.residues.items()
            if residue.exact and classes.get(residue.coordinate) == (residue.phase, residue.step)
        }
        if isinstance(walk, Grid):
            enforced |= {
                atom
                for atom, digit in keys.digits.items()
                if digit.coordinate.period is walk.period
                and not any(bound is not None and bound.depends_on(self.roles.row) for bound in (digit.lo, digit.hi))
            }
        return enforced

    # Key sets

    def consecutive(self, several: Sequence[Keys]) -> KeySet:
        mask = self.graph.any_of(self.graph.all_of(keys.atoms) for keys in several)
        return KeySet(None, tuple(self.run(keys, keys.plain()) for keys in several), self.tables.readable(mask))

    def run(self, keys: Keys, exact: bool) -> Run:
        graph = self.graph
        first, end = self.roles.first, self.roles.end
        guard = self.tables.readable(graph.all_of(keys.guards))
        none = graph.literal(0)

        def guarded(high: Node) -> Node:
            return high if guard.op == "literal" and guard.attribute else graph.make("select", guard, high, none)

        outer = Bounds(self.largest([first, *keys.lows]), guarded(self.smallest([end, *keys.highs])))
        if not (exact and keys.exact):
            return Run(outer, None)
        inner = Bounds(self.largest([first, *keys.inner_lows]), guarded(self.smallest([end, *keys.inner_highs])))
        return Run(outer, outer if inner == outer else inner)

    def subtract(self, keys: Keys, covered: Sequence[Conjunction], rows: Rows) -> KeySet | None:
        """The conjunction's key set without the pairs of the conjunctions before it; None where nothing is left."""
        residual: list[Node] = []
        for other in covered:
            remainders = [
                remainder
                for atom in other
                for part in self.sides(negate(self.graph, atom))
                if not self.empty(remainder := self.solve_atoms((*keys.atoms, part)))
            ]
            if not remainders:
                return None
            if len(remainders) == 1:
                keys = remainders[0]
            else:
                residual.append(negate(self.graph, self.graph.all_of(other)))
        walk = self.choose_walk(keys, rows)
        enforced = self.walked_exactly(keys, walk)
        mask = self.graph.all_of([*(atom for atom in keys.atoms if atom not in enforced), *residual])
        rest = {*keys.residues, *keys.digits, *keys.members} - enforced
        exact = not residual and not rest and not isinstance(walk, Diagonals)
        return KeySet(walk, (self.run(keys, exact),), self.tables.readable(mask))

    def sides(self, atom: Node) -> tuple[Node, ...]:
        """x != y as x < y, y < x where that tells more."""
        return split_unequal(self.graph, atom) or (atom,)

    def largest(self, nodes: Sequence[Node]) -> Node:
        return self._extreme("maximum", nodes)

    def smallest(self, nodes: Sequence[Node]) -> Node:
        return self._extreme("minimum", nodes)

    def _extreme(self, op: str, nodes: Sequence[Node]) -> Node:
        """max or min of those that no other one beats for certain."""
        kept: list[Node] = []
        for node in dict.fromkeys(nodes):
            if any(self.beats(op, other, node) for other in kept):
                continue
            kept = [other for other in kept if not self.beats(op, node, other)]
            kept.append(node)
        result, *others = kept
        for other in others:
            result = self.graph.make(op, result, other)
        return result

    def beats(self, op: str, one: Node, other: Node) -> bool:
        """Whether the larger (smaller) of both is the first for certain."""
        low, high = (other, one) if op == "maximum" else (one, other)
        return at_most(self.algebra, low, high)
