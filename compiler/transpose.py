"""Transposed domains: which queries see a key, in closed form.

The gradients of k and v keep a tile of keys and stream the queries that see them. The condition is solved once more
with the roles of i and j swapped. Conjunctions whose rows are consecutive and whose keys are intervals share one
pass; each other one is a pass of its own, with what earlier ones cover taken out, over the rows that can have
pairs: a strided summary is seen by every later query, but only every stride-th key is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnc.compiler.algebra import Algebra, Congruence, Constraint, Coordinate, Interval, solve
from attnc.compiler.domains import DomainBuilder, Keys
from attnc.compiler.ir import Graph, Node
from attnc.compiler.membership import Roles, Tables
from attnc.compiler.plan import Bounds, Domain, Listed, Rows, Stepped


class Transposer(DomainBuilder):
    """Lowers the condition of one branch to disjoint passes over keys."""

    def __init__(self, graph: Graph, algebra: Algebra, tables: Tables) -> None:
        super().__init__(graph, algebra, tables, Roles.transposed(graph))

    def passes(self, condition: Node) -> tuple[Domain, ...]:
        """The passes: their pairs are disjoint, their union is the condition."""
        keys = self.solve(condition)
        rows = {id(known): self.rows_of(known) for known in keys}
        linear = [known for known in keys if self.shares(known, rows[id(known)])]
        others = sorted((known for known in keys if known not in linear), key=Keys.selected)
        notes = self.taken_notes()
        found = [Domain((self.consecutive(linear),), Rows(), notes)] if linear else []
        covered = [known.atoms for known in linear]
        for known in others:
            key_set = self.subtract(known, covered, rows[id(known)])
            if key_set is not None:
                found.append(Domain((key_set,), rows[id(known)], self.taken_notes()))
            covered.append(known.atoms)
        return tuple(found)

    def taken_notes(self) -> tuple[str, ...]:
        """The notes since the last call."""
        notes = tuple(dict.fromkeys(self.notes))
        self.notes.clear()
        return notes

    def shares(self, known: Keys, rows: Rows) -> bool:
        """Whether the conjunction may join the pass over consecutive rows and intervals."""
        limited = rows.phase is not None or rows.listed is not None or rows.packed
        return not limited and self.choose_walk(known, rows) is None

    def rows_of(self, known: Keys) -> Rows:
        """The rows that can have pairs, grouped so that those of a tile share keys."""
        for guard in known.guards:
            member = self.tables.member(guard, self.roles.row)
            if member is not None and isinstance(member.walk, Listed) and member.row_block is None:
                return Rows(listed=member.walk)
        rows = self.choose_rows([known])
        if rows.square or known.selected():
            return rows
        guards = [solve(self.algebra, guard, self.roles.row) for guard in known.guards]
        fixed = [one for one in guards if one is not None and is_fixed(one)]
        period = rows.period or next((one.coordinate.period for one in fixed if one.coordinate.period), None)
        if rows.period is None and (period is None or self.tied(known, rows)):
            return replace(rows, phase=phase_of(fixed, Coordinate(), rows.step)[0])
        assert period is not None
        return self.packed(rows, period, fixed)

    def tied(self, known: Keys, rows: Rows) -> bool:
        """Whether the walk needs all rows of a tile in one residue class."""
        walk = self.choose_walk(known, rows)
        return isinstance(walk, Stepped) and walk.phase.depends_on(self.roles.row)

    def packed(self, rows: Rows, period: Node, fixed: Sequence[Constraint]) -> Rows:
        """Rows of a grid: only the columns and classes of digits that the guards leave."""
        lows, highs = [self.graph.literal(0)], [period]
        for one in fixed:
            if isinstance(one, Interval) and one.coordinate.period is period:
                lows += [one.lo] if one.lo else []
                highs += [one.hi] if one.hi else []
        high_phase, high_step = phase_of(fixed, Coordinate("high", period), rows.high_step)
        low_phase, low_step = phase_of(fixed, Coordinate("low", period), rows.low_step)
        narrowed = len(lows) + len(highs) > 2
        low = Bounds(self.largest(lows), self.smallest(highs)) if narrowed else None
        return Rows(
            period=period,
            high_step=high_step,
            low_step=low_step,
            high_phase=high_phase,
            low_phase=low_phase,
            low=low,
        )


def is_fixed(constraint: Constraint) -> bool:
    """Whether it is the same for every batch row and head, so that the number of rows is."""
    ends = (constraint.lo, constraint.hi) if isinstance(constraint, Interval) else (constraint.phase, constraint.step)
    return not any(node.type.indices for node in ends if node is not None)


def phase_of(fixed: Sequence[Constraint], at: Coordinate, step: Node | None) -> tuple[Node | None, Node | None]:
    """The class of a coordinate that the rows are in, and the step; the step alone where it isn't known."""
    for one in fixed:
        if isinstance(one, Congruence) and one.coordinate == at and step in (None, one.step):
            return one.phase, one.step
    return None, step
