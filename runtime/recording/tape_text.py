"""A recording as straight-line code: one Python function that does its operations and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from attnc.runtime.recording.native_calls import native
from attnc.runtime.recording.tape import Event, Geometry, Launch, Operation, Place, Read, Recorder

PLAIN = (int, float, bool, str, type(None))


class ChangedError(Exception):
    """The host reads another element than when the call was recorded."""


def program_of(recorder: Recorder, results: Sequence[Tensor]) -> Tape | None:
    """The recording's operations that the results need, as a function; None where it failed (see `failure`)."""
    places = [recorder.place(tensor) for tensor in results]
    if recorder.failed() or not recorder.seen([place.root for place in places]):
        return None
    events, same = merged(recorder)
    places = [replace(place, root=same.get(place.root, place.root)) for place in places]
    return _Writer(recorder, needed(recorder, events, places)).program(places)


def merged(recorder: Recorder) -> tuple[list[Event], dict[int, int]]:
    """The events without those that do again what was done before, and the roots that stand for those left out."""
    changed = {root for event in recorder.events for root in changes(recorder, event)}
    same: dict[int, int] = {}
    known: dict[object, Operation] = {}
    age: dict[int, int] = dict.fromkeys(changed, 0)
    events: list[Event] = []

    def renamed(value: Any) -> Any:
        if isinstance(value, Place):
            return replace(value, root=same.get(value.root, value.root))
        return type(value)(renamed(one) for one in value) if type(value) in (list, tuple) else value

    for event in recorder.events:
        if isinstance(event, Operation):
            args, kwargs = renamed(event.args), {name: renamed(one) for name, one in event.kwargs.items()}
            event = replace(event, args=args, kwargs=kwargs)
            if not event.written and not changed & {*event.made.values()}:
                if (alike := copied(recorder, event)) is not None and alike not in changed:
                    same |= dict.fromkeys(event.made.values(), alike)
                    continue
                ages = tuple(age.get(place.root, 0) for place in places_of(event))
                before = known.setdefault((event.function, spelt(args), spelt(tuple(kwargs.items())), ages), event)
                if before is not event:
                    same |= {root: before.made[at] for at, root in event.made.items()}
                    continue
        elif isinstance(event, Launch):
            event = replace(event, places=renamed(event.places))
        else:
            event = replace(event, place=renamed(event.place))
        for root in changes(recorder, event):
            age[root] += 1
        events.append(event)
    return events, same


def copied(recorder: Recorder, event: Operation) -> int | None:
    """The root that an operation gives again, the gradient of a slice that is all of its axis."""
    if event.function is not torch.ops.aten.slice_backward.default:
        return None
    place, sizes, axis, start, end, step = event.args
    (root,) = event.made.values()
    whole = start == 0 and end >= sizes[axis] and step == 1
    return place.root if whole and place.geometry == recorder.roots[root].geometry else None


def changes(recorder: Recorder, event: Event) -> Iterable[int]:
    """The roots that an event may change."""
    if isinstance(event, Operation):
        return event.written
    return {place.root for place in places_of(event) if isinstance(event, Launch) and recorder.roots[place.root].filled}


def spelt(value: Any) -> object:
    """Arguments so that equal ones have equal types."""
    if isinstance(value, (list, tuple)):
        return tuple(spelt(one) for one in value)
    return (type(value), repr(value)) if isinstance(value, float) else (type(value), value)


def needed(recorder: Recorder, events: Sequence[Event], places: Sequence[Place]) -> list[Event]:
    """The events whose outcome varies and that results, launches or reads follow from, in order."""
    roots = recorder.roots
    wanted = {place.root for place in places}
    kept: list[Event] = []
    for event in reversed(events):
        if isinstance(event, Operation):
            touched = {*event.made.values(), *event.written}
            if not touched & wanted or not any(roots[root].varies for root in touched):
                continue
        kept.append(event)
        wanted |= {place.root for place in places_of(event)}
    return kept[::-1]


def places_of(event: Event) -> list[Place]:
    """All that an event reads or writes of what there was."""
    found: list[Place] = []
    stack: list[Any] = (
        [*event.args, *event.kwargs.values()]
        if isinstance(event, Operation)
        else [*event.places]
        if isinstance(event, Launch)
        else [event.place]
    )
    while stack:
        one = stack.pop()
        if isinstance(one, Place):
            found.append(one)
        elif isinstance(one, (list, tuple)):
            stack += one
    return found


class Tape:
    """What a call does. `run(*tensors)` gives its results, as many as were recorded.

    `held`: the tensors that are kept for it. `reads`: whether the host waits for elements of the device.
    """

    def __init__(self, text: str, names: dict[str, Any], held: list[Tensor], reads: bool) -> None:
        self.text, self.names = text, names
        self.bytes = sum(tensor.untyped_storage().nbytes() for tensor in held)
        self.reads = reads
        exec(compile(text, "<recorded call>", "exec"), names)
        self.run: Callable[..., list[Tensor]] = names["run"]


class _Writer:
    def __init__(self, recorder: Recorder, events: list[Event]) -> None:
        self.roots = recorder.roots
        self.events = events
        self.lines: list[str] = []
        self.names: dict[str, Any] = {
            "as_strided": torch.as_strided,
            "ChangedError": ChangedError,
        }
        self.known: dict[tuple[int, Geometry], str] = {}  # views at hand
        self.held: dict[int, Tensor] = {}
        self.given = [root.given for root in self.roots if root.given is not None]

    def program(self, places: Sequence[Place]) -> Tape:
        last: dict[int, int] = {}
        for at, event in enumerate(self.events):
            last |= {place.root: at for place in places_of(event)}
            if isinstance(event, Operation):
                last |= {root: max(at, last.get(root, 0)) for root in event.made.values()}
        ends: dict[int, list[int]] = {}
        kept = {place.root for place in places}
        for root, at in last.items():
            if root not in kept and self.roots[root].varies:
                ends.setdefault(at, []).append(root)
        for at, event in enumerate(self.events):
            self.event(event)
            self.release(ends.get(at, []))
        lines = [*self.lines, f"return [{', '.join(self.result(places, at) for at in range(len(places)))}]"]
        count = max(self.given, default=-1) + 1
        head = f"def run({', '.join([*(f'x{n}' for n in range(count)), '*rest'])}):\n"
        reads = any(isinstance(event, Read) for event in self.events)
        text = head + "".join(f"    {line}\n" for line in lines)
        return Tape(text, self.names, list(self.held.values()), reads)

    def event(self, event: Event) -> None:
        if isinstance(event, Operation):
            call = self.call(self.function(event), event.args, event.kwargs)
            names = [f"r{event.made[at]}" if at in event.made else "_" for at in range(event.results)]
            if not event.made:
                self.lines.append(call)
            else:
                self.lines.append(
                    f"{names[0] if len(names) == 1 and not self.listed(event) else ', '.join(names) + ','} = {call}"
                )
        elif isinstance(event, Launch):
            self.lines.append(self.call(event.start, event.places, {}))
        else:
            self.lines.append(f"if {self.of(event.place)}.item() != {self.spelt(event.value)}: raise ChangedError")

    def function(self, event: Operation) -> Any:
        """What to call for an operation."""

        def shown(leaf: Any) -> Any:
            if not isinstance(leaf, Place):
                return leaf
            size, stride, _ = leaf.geometry
            return torch.empty_strided(size, stride, dtype=self.roots[leaf.root].dtype, device="meta")

        args, kwargs = tree_map(shown, (event.args, dict(event.kwargs)), is_leaf=lambda one: isinstance(one, Place))
        return native(event.function, args, kwargs)

    @staticmethod
    def listed(event: Operation) -> bool:
        """Whether an operation of one result gives a list or tuple of it."""
        returns = event.function._schema.returns
        return len(returns) > 1 or "[]" in str(returns[0].type) or str(returns[0].type).startswith("List")

    def call(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        given = [self.spelt(one) for one in args] + [f"{name}={self.spelt(one)}" for name, one in kwargs.items()]
        return f"{self.constant(function)}({', '.join(given)})"

    def spelt(self, value: Any) -> str:
        """An argument as text."""
        if isinstance(value, Place):
            return self.of(value)
        if isinstance(value, (list, tuple)) and places_of(Launch(None, tuple(value))):
            return f"[{', '.join(self.spelt(one) for one in value)}]"
        if type(value) in PLAIN and value == value and value not in (float("inf"), float("-inf")):
            return repr(value)
        return self.constant(value)

    def constant(self, value: Any) -> str:
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    def of(self, place: Place) -> str:
        """A tensor at hand; its view is made where it is first asked for."""
        root, key = self.roots[place.root], (place.root, place.geometry)
        if key not in self.known:
            if not root.varies:
                assert root.tensor is not None
                self.held[place.root] = root.tensor
                view = root.tensor.detach()
                self.known[key] = self.constant(
                    view if place.geometry == root.geometry else view.as_strided(*place.geometry)
                )
            elif place.geometry == root.geometry:
                self.known[key] = self.name(place.root)
            else:
                self.known[key] = f"v{len(self.lines)}"
                self.lines.append(f"v{len(self.lines)} = {self.view(place)}")
        return self.known[key]

    def name(self, root: int) -> str:
        given = self.roots[root].given
        return f"r{root}" if given is None else f"x{given}"

    def view(self, place: Place) -> str:
        size, stride, offset = place.geometry
        root = self.roots[place.root]
        name = self.name(place.root)
        if root.given is None:
            return f"as_strided({name}, {size}, {stride}, {offset})"
        more = offset - root.geometry[2]
        return f"as_strided({name}, {size}, {stride}, {name}.storage_offset() + {more})"

    def release(self, roots: list[int]) -> None:
        """Lets memory go after its last use."""
        gone = [name for (root, _), name in self.known.items() if root in roots]
        gone += [self.name(root) for root in roots if self.roots[root].given is None]
        self.known = {key: name for key, name in self.known.items() if key[0] not in roots}
        if gone := [name for name in dict.fromkeys(gone) if not name.startswith("x")]:
            self.lines.append(f"del {', '.join(gone)}")

    def result(self, places: Sequence[Place], at: int) -> str:
        """A result: a tensor object of its own."""
        place, root = places[at], self.roots[places[at].root]
        if not root.varies:
            return f"{self.of(place)}.clone()"
        if root.given is not None or place in places[:at]:
            return self.view(place)
        return self.name(place.root) if place.geometry == root.geometry else self.view(place)
