"""`.attn` patterns as the attention of transformers' text models: `attn_implementation="attnc:longformer"`.

A pattern takes the place of a model's scores, masks and softmax: which keys take part is what its `where` says, not
what the model's own window or causality says. What the model hands to attention besides q, k, v and `scaling` reaches
the pattern by name: a parameter `softcap: real` or `sliding_window: int`, an input `s_aux: real[h]` (logits of sinks).
What would change the scores and is not declared is refused, as are dropout and masks that only the model knows.

An input `live: bool[b, t]` (or int) is which keys are no padding. Positions count the padding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from attnc.dsl.terms import Input
from attnc.dsl.types import Base
from attnc.runtime.modules import AttnModule, load
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.refusal import extra_inputs, refuse

PREFIX = "attnc:"
LIVE = "live"
# What models give to attention that changes the scores or the keys, beyond q, k, v and their scaling.
SCORING = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")

Attention = Callable[..., tuple[Tensor, None]]


def register(
    source: str | os.PathLike[str] | AttnModule | CompiledPattern,
    settings: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
) -> tuple[str, ...]:
    """Makes patterns available to transformers as `attnc:NAME`, one name for each pattern of a file; returns the names.

    source: the path of a `.attn` file, what `attnc.load` gave, or one of its patterns. settings: parameters and inputs
    of every call, such as `{"window": 256}` or `{"slope": slopes}`; tensors go to the device of the queries. They go
    before what the model gives under the same name. name: stands for NAME, where there is one pattern. A name that is
    registered again means the new pattern from then on.

    Raises AttnError where the file has mistakes or a pattern's result is not one vector a query; ValueError for a
    setting that no pattern has.
    """
    found = _patterns(source)
    chosen = dict(settings or {})
    known = {keyword for pattern in found for keyword in _keywords(pattern)}
    if unknown := sorted(chosen.keys() - known):
        raise ValueError(
            f"no pattern has a parameter or an input {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    if name is not None and len(found) != 1:
        raise ValueError(f"a name for one pattern, but there are {len(found)}: {', '.join(p.__name__ for p in found)}")
    names = []
    for pattern in found:
        mine = {keyword: chosen[keyword] for keyword in chosen if keyword in _keywords(pattern)}
        names.append(PREFIX + (name or pattern.__name__))
        _announce(names[-1], PatternAttention(pattern, mine))
    return tuple(names)


def by_layer(choice: Mapping[str, str]) -> str:
    """Registers a mix of registered patterns, one for each layer, and returns its name.

    choice: from layers, counted from 0, such as "6" or "0-5" (both ends), to names, such as "attnc:causal". Raises
    ValueError for layers that cannot be read or are named twice and for names that are not registered. A layer of the
    model that no entry names is refused when it runs.
    """
    attentions: dict[int, Attention] = {}
    for layers, name in choice.items():
        if not name.startswith(PREFIX) or name not in AttentionInterface():
            raise ValueError(f"`{name}` is not a registered pattern: call `register` with its file first")
        for layer in _layers(layers):
            if layer in attentions:
                raise ValueError(f"layer {layer} is named twice")
            attentions[layer] = AttentionInterface()[name]
    label = PREFIX + ", ".join(f"{layers} {name.removeprefix(PREFIX)}" for layers, name in choice.items())
    _announce(label, LayerChoice(label, attentions))
    return label


def _patterns(source: str | os.PathLike[str] | AttnModule | CompiledPattern) -> list[CompiledPattern]:
    """The patterns meant, each with a result that a layer can use."""
    if isinstance(source, CompiledPattern):
        found = [source]
    else:
        module = source if isinstance(source, AttnModule) else load(source)
        found = list(module.patterns.values())
    for pattern in found:
        if pattern.pattern.output_axes[:3] != ("b", "h", "i"):
            axes = ", ".join(pattern.pattern.output_axes)
            refuse(pattern.pattern, "output", f"a layer needs one vector a query, but the result is [{axes}]")
    return found


def _keywords(pattern: CompiledPattern) -> set[str]:
    """What a pattern can be given by name; not what says which keys are padding, which is the batch's."""
    padding = {declared.name for declared in extra_inputs(pattern.pattern) if _tells_padding(declared)}
    return {*pattern.__signature__.parameters} - {"q", "k", "v"} - padding


def _layers(text: str) -> range:
    """ "6" or "0-5"."""
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and (last.isdecimal() if dash else not last)):
        raise ValueError(f'`{text}` names no layers: write one, such as "6", or the first and the last, such as "0-5"')
    return range(int(first), int(last or first) + 1)


def _announce(name: str, attention: Attention) -> None:
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, padding)


def padding(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    *,
    config: Any,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **rest: Any,
) -> Tensor | None:
    """What transformers makes of a batch before the layers run: (B, M) bool, which keys are real; None where all are.

    Raises ValueError where the model's mask says more than padding, or where the keys are not the tokens 0 .. M - 1 of
    which the queries are the last.
    """
    name = config._attn_implementation
    if kv_offset:
        raise ValueError(
            f"{name}: the cache has dropped the first {kv_offset} keys of a sliding-window layer, so that positions "
            "are lost; give the model a cache that keeps all: `past_key_values=DynamicCache()`"
        )
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_length:
        raise ValueError(
            f"{name}: the queries are not the last tokens of the keys, as in a static cache or in cross-attention; "
            "patterns need a cache that grows, such as `DynamicCache`"
        )
    if not (allow_is_causal_skip or allow_is_bidirectional_skip):
        raise ValueError(
            f"{name}: the model makes a mask of its own here, for packed sequences for example, which a pattern does "
            "not see; write it in the pattern, with an input such as `doc: int[b, t]` that `register` is given"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask[:, -kv_length:]


@dataclass(frozen=True)
class PatternAttention:
    """What transformers calls in a layer: one pattern with the settings of its registration."""

    pattern: CompiledPattern
    settings: Mapping[str, Any]

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **given: Any,
    ) -> tuple[Tensor, None]:
        """query (B, H, N, D), key and value (B, Hk, M, ..), attention_mask as `padding` made it: (B, N, H, E)."""
        self._require_self_attention(module)
        if dropout:
            message = f"the model drops {dropout:.0%} of its attention weights in training, which patterns do not"
            self._refuse("argument", message, "set the dropout of attention in the model's configuration to 0")
        settings = self._from_model({**given, "scale": scaling})
        settings |= {name: x.to(query.device) if isinstance(x, Tensor) else x for name, x in self.settings.items()}
        self._padding(attention_mask, key, settings)
        return self.pattern(query, key, value, **settings).transpose(1, 2), None

    def _from_model(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the model gives and the pattern declares; what it may not leave out is refused."""
        declared = _keywords(self.pattern)
        for name in SCORING:
            if given.get(name) is not None and name not in declared:
                shown = "" if isinstance(given[name], Tensor) else f" = {given[name]}"
                message = f"the model gives `{name}`{shown} to attention, which this pattern does not take"
                self._refuse("argument", message, f"declare `{name}` and use it, or turn it off in the configuration")
        return {name: x for name, x in given.items() if name in declared and x is not None}

    def _padding(self, mask: Tensor | None, key: Tensor, settings: dict[str, Any]) -> None:
        """Sets the input `live` from the batch's padding."""
        declared = next((d for d in extra_inputs(self.pattern.pattern) if _tells_padding(d)), None)
        if mask is not None and mask.ndim != 2:
            message = f"the model was given a mask of {mask.ndim} dimensions, which a pattern does not see"
            self._refuse("argument", message, "write the condition in the pattern's `where`")
        if declared is None:
            if mask is not None:
                help = "declare `input live: bool[b, t]` and add `and live[j]` to each `where`"
                self._refuse("argument", "the batch is padded, and this pattern does not say what padding is", help)
            return
        if mask is None:
            if declared.default is not None:
                return
            mask = key.new_ones((), dtype=torch.bool).expand(key.shape[0], key.shape[2])
        settings[LIVE] = mask if declared.base is Base.BOOL else mask.to(torch.int32)

    def _require_self_attention(self, module: torch.nn.Module) -> None:
        config = getattr(module, "config", None)
        if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
            message = "the model has cross-attention, where the positions of queries and keys are unrelated"
            self._refuse("argument", message, "patterns work in models of self-attention")

    def _refuse(self, code: str, message: str, help: str) -> None:
        refuse(self.pattern.pattern, code, message, help=help)


@dataclass(frozen=True)
class LayerChoice:
    """What transformers calls where layers have different patterns."""

    name: str
    attentions: Mapping[int, Attention]

    def __call__(self, module: torch.nn.Module, *tensors: Tensor | None, **given: Any) -> tuple[Tensor, None]:
        """The attention of the module's layer. Raises ValueError for a layer without one."""
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or layer not in self.attentions:
            raise ValueError(f"{self.name}: no pattern for layer {layer}; named are {sorted(self.attentions)}")
        return self.attentions[layer](module, *tensors, **given)


def _tells_padding(declared: Input) -> bool:
    return declared.name == LIVE and declared.base is not Base.REAL and declared.axes in (("b", "t"), ("b", "j"))
