"""A compiled pattern: the callable that a user gets from a `.attn` file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from keyword import iskeyword
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from attnc.dsl.source import Source
from attnc.dsl.terms import Input, Parameter, Pattern
from attnc.dsl.types import Base
from attnc.runtime.binding import Bound, Checked, bind, flat, form_of
from attnc.runtime.operator import Prepared, checked, require
from attnc.runtime.packing import pack
from attnc.runtime.program import Program, program, register
from attnc.runtime.refusal import extra_inputs, refuse

if TYPE_CHECKING:
    import os

    from matplotlib.figure import Figure

    from attnc.runtime.decoding.decoding_cache import DecodingCache
    from attnc.runtime.decoding.kv_cache import Pages
    from attnc.runtime.state import State
    from attnc.runtime.tools.picture import View
    from attnc.runtime.tools.tuning import Outcome

Function = TypeVar("Function", bound=Callable[..., Any])
REMEMBERED = 256  # forms of calls that were checked
PYTHON_TYPES = {Base.BOOL: bool, Base.INT: int, Base.REAL: float}


def constant(function: Function) -> Function:
    """What `torch.compiler.assume_constant_result` does; that takes over a second to import all of torch._dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant  # a graph cannot hold checking a text again
def _key_for_lengths(key: str, names: tuple[str, ...], lengths: tuple[int, ...]) -> str:
    return program(key).with_lengths(dict(zip(names, lengths, strict=True))).key


@constant  # nor replacing parameters by numbers
def _key_for_numbers(key: str, names: tuple[str, ...], numbers: tuple[int, ...]) -> str:
    return program(key).with_numbers(dict(zip(names, numbers, strict=True))).key


@constant  # nor compiling it
def _is_one_softmax(key: str) -> bool:
    return program(key).is_one_softmax


class CompiledPattern:
    """One pattern of a file. Made by `attnc.load`, `attnc.compile` and the import of a `.attn` file.

    Call it with q (B, H, N, D), k (B, Hk, M, D), v (B, Hk, M, E) of any strides, H a multiple of Hk, and with
    parameters and declared inputs by keyword. N < M: the queries are the last N positions. The result is
    (B, H, N, E), or what the file says. float32, bfloat16 and float16 accumulate in float32; float64 (on a CPU)
    in float64. Raises AttnError, located in the file, for arguments that its declarations don't allow.
    """

    def __init__(self, pattern: Pattern, root: Path | None = None, known: frozenset[str] = frozenset()) -> None:
        """`root`: the folder of its file. `known`: what all patterns of the file can be given by name."""
        self.known = known
        self._program = register(pattern, root)
        self._key = self._program.key
        self._pattern = pattern
        self._parameters = self._program.parameters
        self._tuples = tuple(p.name for p in self._parameters if p.is_tuple)
        self._statics = self._program.statics
        self._known_forms: dict[tuple[object, ...], Checked] = {}
        self.__name__ = self.__qualname__ = pattern.name
        self.__doc__ = _documentation(pattern, self._parameters)
        self.__signature__ = signature(pattern, self._parameters)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor | None = None, **settings: Any) -> Tensor:
        """Attention of q over k and v; see the class."""
        return self.outputs(q, k, v, settings)[0]

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
        """The result, and the natural log of each row's sum of exponentials, its sink included: (B, H, N).

        lse is float32 (float64 for float64), -inf for a row without a live key; both have gradients. Raises AttnError
        for a pattern whose result is not one softmax (a merge is one), which has no such sum.
        """
        self._require_one_softmax()
        return self.outputs(q, k, v, settings)

    def with_state(
        self, q: Tensor, k: Tensor, v: Tensor | None = None, *, state: State | None = None, **settings: Any
    ) -> tuple[Tensor, State]:
        """The result, and what these tokens leave to later ones: a long sequence in parts, with gradients through both.

        `state`: what an earlier call left. Then the result is what one call with all tokens gives at the last N of
        this call's M, N <= M. Inputs over t and j hold this call's tokens. `State` has shapes and types. For patterns
        that need nothing but states of earlier tokens; raises AttnError, located, for others (a window, say), which
        `cache` and `decode` serve.
        """
        if "state" in self.__signature__.parameters:
            refuse(self._pattern, "argument", "`state` is an argument of `with_state`", about="state", help="rename it")
        return self.outputs_with_state(q, k, v, state, settings)

    def outputs_with_state(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        state: State | None,
        settings: dict[str, Any],
        backend: str = "auto",
    ) -> tuple[Tensor, State]:
        """`with_state` on a back end, as for `outputs`."""
        from attnc.runtime.state import call_with_state

        q, k, v = _autocast(q, k, v)
        key, ints, floats, inputs = self._checked(q, k, v, settings)
        return call_with_state(self._pattern, key, (q, k, v, inputs), (ints, floats), state, backend)

    @property
    def is_one_softmax(self) -> bool:
        """Whether the result is one softmax over keys, or a merge: it has a log-sum-exp."""
        return bool(_is_one_softmax(self._key))

    def _require_one_softmax(self) -> None:
        if not self.is_one_softmax:
            help = "a result of the form `softmax[j](..) @ v`, or a `merge` of such, has one"
            message = "there is no log-sum-exp of a result that is more than one softmax"
            refuse(self._pattern, "argument", message, help=help)

    def outputs(
        self, q: Tensor, k: Tensor, v: Tensor | None, settings: dict[str, Any], backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """The result and, where it is one softmax, the natural log of each row's sum (B, H, N); else an empty tensor.

        A merge is one softmax. A row without a live key gives 0 and -inf. `backend`: "auto", "executor" (CPU) or
        "triton" (CUDA; on a CPU where TRITON_INTERPRET=1).
        """
        q, k, v = _autocast(q, k, v)
        key, ints, floats, inputs = self._checked(q, k, v, settings)
        out, statistics, _ = torch.ops.attnc.attention(key, q, k, v, inputs, ints, floats, backend)
        return out, statistics

    def _checked(
        self, q: Tensor, k: Tensor, v: Tensor | None, settings: dict[str, Any]
    ) -> tuple[str, list[int], list[float], list[Tensor]]:
        """The key of the program, ints, floats and inputs, as the operator takes them."""
        form = None if torch.compiler.is_compiling() else form_of(q, k, v, settings)
        known = self._known_forms.get(form) if form is not None else None
        if known is not None:
            return known.key, known.ints, known.floats, known.inputs(settings)
        bound = bind(self._pattern, self._parameters, q, k, v, settings)
        key, ints, floats = self._packed(bound)
        if form is not None:
            defaults = {name: value for name, value in bound.inputs.items() if settings.get(name) is None}
            self._remember(form, Checked(key, ints, floats, tuple(bound.inputs), defaults))
        return key, ints, floats, list(bound.inputs.values())

    def _remember(self, form: tuple[object, ...], known: Checked) -> None:
        if len(self._known_forms) >= REMEMBERED:
            self._known_forms.clear()
        self._known_forms[form] = known

    def cache(self, max_length: int, *, pages: Pages | None = None, **parameters: Any) -> DecodingCache:
        """An empty cache for at most `max_length` tokens of these parameters: see `DecodingCache` and `decode`.

        `pages`: where keys live instead, in a paged memory. Raises AttnError, located, for a pattern that cannot be
        decoded: a query depends on later tokens, or on how many there are.
        """
        from attnc.runtime.decoding.decoding_cache import DecodingCache  # late: it brings the compiler

        return DecodingCache(self._program, max_length, pages, parameters)

    def decode(
        self,
        q: Tensor,
        cache: DecodingCache,
        k: Tensor,
        v: Tensor | None = None,
        *,
        counts: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The result at new tokens, which enter the cache: rows L .. L + n of a call with all of them, no gradient.

        q (B, H, n, D), k (B, Hk, n, D), v (B, Hk, n, E), and inputs over i, j or t, of the n new tokens alone; other
        inputs whole. One token or many at a time: the first call may be the whole prompt. `counts` (B,), ints: only the
        first so many tokens of each row are there, and the result at the others is 0.
        Raises AttnError, located, for what does not fit the cache.
        """
        return cache.decode(self._pattern, q, k, v, counts, inputs)

    def reference(self, q: Tensor, k: Tensor, v: Tensor | None = None, **settings: Any) -> Tensor:
        """The meaning of the pattern in float64, straight from its text: slow, of memory N x M, differentiable."""
        from attnc.runtime.reference.meaning import reference

        pattern, bound = self.bound_for_reference(q, k, v, settings)
        return reference(pattern, q, k, v, bound.parameters, bound.inputs)

    def reference_with_lse(
        self, q: Tensor, k: Tensor, v: Tensor | None = None, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        """`reference` of `with_lse`, for the same patterns."""
        from attnc.runtime.reference.meaning import reference_with_lse

        self._require_one_softmax()
        pattern, bound = self.bound_for_reference(q, k, v, settings)
        return reference_with_lse(pattern, q, k, v, bound.parameters, bound.inputs)

    def bound_for_reference(
        self, q: Tensor, k: Tensor, v: Tensor | None, settings: dict[str, Any]
    ) -> tuple[Pattern, Bound]:
        """The checked tree, for tuples of the lengths given, and the arguments that the reference takes."""
        bound = bind(self._pattern, self._parameters, q, k, v, settings)
        program = self._program.with_lengths({name: len(bound.parameters[name]) for name in self._tuples})
        require(program, flat(bound.parameters), bound.sizes)
        return program.pattern, bound

    def live_fraction(self, q: Tensor, k: Tensor, v: Tensor | None = None, **settings: Any) -> float:
        """Pairs of rows and keys that softmaxes of the text give a weight, as a share of all query-key pairs.

        Every branch counts, and one over summary keys counts those. Runs the steps, on q's device.
        """
        from attnc.runtime.tools.explanation import streamed_pairs

        pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        return streamed_pairs(self.prepared(q, k, v, settings)).live / pairs

    def explain(self, q: Tensor, k: Tensor, v: Tensor | None = None, *, verbose: bool = False, **settings: Any) -> str:
        """What each stage of the compiler did and declined and why, and what this call costs."""
        from attnc.runtime.tools.explanation import explain

        return explain(self.prepared(q, k, v, settings), verbose=verbose)

    def tune(self, q: Tensor, k: Tensor, v: Tensor | None = None, *, most: int = 6, **settings: Any) -> list[Outcome]:
        """Measures tile shapes for every kernel of such a call and of its gradients, on q's CUDA device.

        The fastest that give the same results are kept on disk, and taken by calls of such sizes from now on, in this
        process and in others. `most`: shapes of a kernel that are measured.
        """
        from attnc.runtime.tools.tuning import tune

        return tune(self, q, k, v, settings, most=most)

    def draw(
        self,
        q: Tensor | None = None,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        view: View | None = None,
        tile: int | None = None,
        file: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> Figure:
        """A matplotlib figure, also written to `file` (.svg, .png or .pdf) if one is given.

        `view`: "pairs", which pairs and which tiles are live; "weights", every key's weight on every row; "graph", what
        the pattern computes. Without q and k it is drawn at small sizes with tensors made for it, as "pairs", or as
        "weights" where no key, or only every later one, is left out; parameters that are not given are those of the
        file's `# draw:` line, its first `# check:` line, or small. With q and k it shows the first element of the
        batch, as "weights". `tile`: rows and keys of a tile of "pairs".

        Raises AttnError as a call does and for more than 1024 positions, and MissingExtraError (an ImportError)
        without matplotlib.
        """
        from attnc.runtime.tools.picture import drawn

        return drawn(self, q, k, v, settings, view=view, tile=tile, file=file)

    def prepared(self, q: Tensor, k: Tensor, v: Tensor | None, settings: dict[str, Any]) -> Prepared:
        """The call that the back ends would get."""
        bound = bind(self._pattern, self._parameters, q, k, v, settings)
        key, ints, floats = self._packed(bound)
        inputs = [bound.inputs[declared.name] for declared in extra_inputs(self._pattern)]
        return checked(key, q, k, v, inputs, ints, floats)

    @property
    def kernels(self) -> dict[str, str]:
        """Text of the generated Triton modules, by name."""
        from attnc.runtime.cuda.chunked_steps import chunked_texts
        from attnc.runtime.cuda.launch import kernel_texts
        from attnc.runtime.cuda.launch_pointwise import row_texts

        streamed = kernel_texts(self._program.pattern.name, self._program.plans)
        return streamed | chunked_texts(self._program.composition) | row_texts(self._program.composition)

    @property
    def pattern(self) -> Pattern:
        """The checked tree."""
        return self._pattern

    @property
    def program(self) -> Program:
        """The checked tree and the plan."""
        return self._program

    @property
    def source(self) -> str:
        """Text of the pattern as its file has it."""
        return self._pattern.span.text

    @property
    def file(self) -> Source:
        """The file that the pattern is from."""
        return self._pattern.source

    def _packed(self, bound: Bound) -> tuple[str, list[int], list[float]]:
        key = self._key
        if self._tuples:
            key = _key_for_lengths(key, self._tuples, tuple(len(bound.parameters[name]) for name in self._tuples))
        if self._statics:
            key = _key_for_numbers(key, self._statics, tuple(bound.parameters[name] for name in self._statics))
        ints, floats = pack(self._program, bound.parameters)
        return key, ints, floats

    def __repr__(self) -> str:
        return f"<pattern {self.__name__}{self.__signature__} of {self._pattern.source.name}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledPattern:
        return self  # nothing of it changes; modules that hold it can be copied

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError(f"pattern {self.__name__} is not pickled: load its file where it is needed")


def _autocast(q: Tensor, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under torch.autocast, q, k and v in its type, as for torch's own attention; else as they are."""
    if not isinstance(q, Tensor) or q.is_meta or not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return _lowered(q, dtype), _lowered(k, dtype), None if v is None else _lowered(v, dtype)


def _lowered(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def signature(pattern: Pattern, parameters: tuple[Parameter, ...]) -> inspect.Signature:
    """The Python signature of a pattern: q, k, v, then its parameters and inputs by keyword.

    A name that is a word of Python's, such as `lambda`, can be given by `**{"lambda": ..}` alone.
    """
    tensors = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Tensor) for name in "qkv"]
    if not pattern.uses_value:
        tensors[2] = tensors[2].replace(default=None)
    declared: list[Parameter | Input] = [*extra_inputs(pattern), *parameters]
    keywords = [_keyword(entry) for entry in declared if not iskeyword(entry.name)]
    if len(keywords) < len(declared):
        keywords.append(inspect.Parameter("others", inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(tensors + keywords, return_annotation=Tensor)


def _keyword(item: Parameter | Input) -> inspect.Parameter:
    if isinstance(item, Input):
        default: Any = inspect.Parameter.empty if item.default is None else None
        return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Tensor)
    optional = item.default is not None or item.name == "scale"
    return inspect.Parameter(
        item.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=item.default if optional else inspect.Parameter.empty,
        annotation=tuple[int, ...] if item.is_tuple else PYTHON_TYPES[item.base],
    )


def _documentation(pattern: Pattern, parameters: tuple[Parameter, ...]) -> str:
    """Docstring: the text, and what each keyword is."""
    lines = [f"Attention pattern `{pattern.name}` of {pattern.source.name}.", "", pattern.span.text.rstrip(), ""]
    lines.append(f"Returns [{', '.join(pattern.output_axes)}].")
    lines += [
        f"{entry.name}: {entry.base}[{', '.join(entry.axes)}]{_optional(entry)}" for entry in extra_inputs(pattern)
    ]
    for p in parameters:
        default = "D**-0.5" if p.default is None and p.name == "scale" else p.default
        lines.append(f"{p.name}: {p.base}{'s' if p.is_tuple else ''}" + ("" if default is None else f" = {default}"))
    return "\n".join(lines)


def _optional(declared: Input) -> str:
    return "" if declared.default is None else f" = {declared.default.span.text}"
