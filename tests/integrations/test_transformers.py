"""Patterns in transformers' models: small ones with random weights, beside their own eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

import attnc
from attnc.integrations.transformers import by_layer, register

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}

# Patterns for models: padding, a cap and a window as the model's configuration has them.
TEXT = """
pattern padded:
    input live: bool[b, t]
    out = softmax[j](q @ k * scale where j <= i and live[j]) @ v

pattern padded_int:
    input live: int[b, t]
    out = softmax[j](q @ k * scale where j <= i and live[j] == 1) @ v

pattern padded_both_ways:
    input live: bool[b, t] = true
    out = softmax[j](q @ k * scale where live[j]) @ v

pattern capped(softcap: real, sliding_window: int = 1000000):
    out = softmax[j](softcap * tanh(q @ k * scale / softcap) where 0 <= i - j < sliding_window) @ v

pattern windowed(sliding_window: int = 1000000):
    out = softmax[j](q @ k * scale where 0 <= i - j < sliding_window) @ v

pattern costly:
    input slope: real[h]
    out = softmax[j](q @ k * scale - slope * (i - j) where j <= i) @ v
"""


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    for name in ("causal", "full", "sliding_window", "streaming"):
        register(EXAMPLES / f"{name}.attn", {"window": 5} if name == "sliding_window" else None)
    register(attnc.compile(TEXT), {"slope": torch.linspace(0.1, 1.0, 6)})


def model_of(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).eval()


def tokens(length: int = 13, batch: int = 2) -> Tensor:
    return torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def result(model: Any, attention: str, ids: Tensor, **given: Any) -> Tensor:
    """Logits, or last hidden states, under an attention."""
    model.set_attn_implementation(attention)
    made = model(ids, **given)
    found: Tensor = made.logits if hasattr(made, "logits") else made.last_hidden_state
    return found


CAUSAL = [
    pytest.param(LlamaForCausalLM, LlamaConfig(**GROUPED), id="llama"),
    pytest.param(Qwen2ForCausalLM, Qwen2Config(**GROUPED), id="qwen2"),
    pytest.param(Qwen3ForCausalLM, Qwen3Config(**GROUPED), id="qwen3"),
    pytest.param(
        Gemma3ForCausalLM, Gemma3TextConfig(**GROUPED, layer_types=["full_attention"] * 2), id="gemma3"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "config"), CAUSAL)
def test_causal_is_the_models_own_attention(kind: Any, config: Any) -> None:
    model = model_of(kind, config)
    torch.testing.assert_close(result(model, "attnc:causal", tokens()), result(model, "eager", tokens()))


def test_full_is_the_attention_of_an_encoder() -> None:
    model = model_of(BertModel, BertConfig(**SMALL))
    torch.testing.assert_close(result(model, "attnc:full", tokens()), result(model, "eager", tokens()))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (MistralForCausalLM, MistralConfig(**GROUPED, sliding_window=5)),
        (Qwen2ForCausalLM, Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=0)),
        (Gemma3ForCausalLM, Gemma3TextConfig(**GROUPED, sliding_window=5, layer_types=["sliding_attention"] * 2)),
    ],
    ids=["mistral", "qwen2", "gemma3"],
)
@pytest.mark.parametrize("pattern", ["sliding_window", "windowed"])
def test_a_window_is_the_models_own(kind: Any, config: Any, pattern: str) -> None:
    model = model_of(kind, config)
    expected = result(model, "eager", tokens())
    torch.testing.assert_close(result(model, f"attnc:{pattern}", tokens()), expected)
    assert not torch.allclose(result(model, "attnc:causal", tokens()), expected)


def test_the_models_cap_and_window_reach_the_pattern_by_name() -> None:
    config = Gemma2Config(**GROUPED, sliding_window=5, attn_logit_softcapping=0.5)
    model = model_of(Gemma2ForCausalLM, config)
    assert {*config.layer_types} == {"sliding_attention", "full_attention"}
    expected = result(model, "eager", tokens())
    torch.testing.assert_close(result(model, "attnc:capped", tokens()), expected)
    with pytest.raises(attnc.AttnError, match=r"causal: the model gives `softcap` = 0\.5 to attention"):
        result(model, "attnc:causal", tokens())


@pytest.mark.parametrize("pattern", ["padded", "padded_int"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_an_input_of_the_pattern(pattern: str, side: str) -> None:
    model = model_of(LlamaForCausalLM, LlamaConfig(**GROUPED))
    mask = torch.ones(2, 13, dtype=torch.int64)
    mask[0, : 4 if side == "left" else 13] = 0 if side == "left" else 1
    if side == "right":
        mask[0, 9:] = 0
    out, expected = (result(model, name, tokens(), attention_mask=mask) for name in (f"attnc:{pattern}", "eager"))
    torch.testing.assert_close(out[mask == 1], expected[mask == 1])
    unmasked = result(model, f"attnc:{pattern}", tokens())
    torch.testing.assert_close(unmasked, result(model, "eager", tokens()))
    assert (side == "right") == torch.allclose(out[mask == 1], unmasked[mask == 1])


def test_padding_of_an_encoder() -> None:
    model = model_of(BertModel, BertConfig(**SMALL))
    mask = torch.ones(2, 13, dtype=torch.int64)
    mask[1, 8:] = 0
    out, expected = (result(model, name, tokens(), attention_mask=mask) for name in ("attnc:padded_both_ways", "eager"))
    torch.testing.assert_close(out[mask == 1], expected[mask == 1])


def test_padding_without_an_input_for_it_is_refused() -> None:
    model = model_of(LlamaForCausalLM, LlamaConfig(**GROUPED))
    mask = torch.ones(2, 13, dtype=torch.int64)
    result(model, "attnc:causal", tokens(), attention_mask=mask)  # nothing is padded
    mask[0, 0] = 0
    with pytest.raises(attnc.AttnError) as refused:
        result(model, "attnc:causal", tokens(), attention_mask=mask)
    assert "declare `input live: bool[b, t]` and add `and live[j]` to each `where`" in str(refused.value)


@pytest.mark.parametrize("attention", ["attnc:causal", "attnc:sliding_window", "attnc:streaming"])
def test_a_cache_gives_what_the_whole_sequence_gives(attention: str) -> None:
    model = model_of(LlamaForCausalLM, LlamaConfig(**GROUPED))
    ids = tokens()
    whole = result(model, attention, ids)
    cache = DynamicCache()
    steps = [result(model, attention, part, past_key_values=cache) for part in ids.split([6, 4, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)


def test_generation_with_padding_on_the_left() -> None:
    model = model_of(LlamaForCausalLM, LlamaConfig(**GROUPED))
    mask = torch.ones(2, 13, dtype=torch.int64)
    mask[0, :4] = 0
    written = []
    for attention in ("attnc:padded", "eager"):
        model.set_attn_implementation(attention)
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        written.append(model.generate(tokens(), attention_mask=mask, **settings))
    assert torch.equal(*written)


def test_layers_have_patterns_of_their_own() -> None:
    model = model_of(LlamaForCausalLM, LlamaConfig(**GROUPED | {"num_hidden_layers": 3}))
    ids = tokens()
    mixed = by_layer({"0-1": "attnc:sliding_window", "2": "attnc:causal"})
    config = Qwen2Config(
        **GROUPED | {"num_hidden_layers": 3}, use_sliding_window=True, sliding_window=5,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    own = model_of(Qwen2ForCausalLM, config)
    torch.testing.assert_close(result(own, mixed, ids), result(own, "eager", ids))
    assert not torch.allclose(result(model, mixed, ids), result(model, "attnc:causal", ids))
    with pytest.raises(ValueError, match="no pattern for layer 2; named are \\[0, 1\\]"):
        result(model, by_layer({"0-1": "attnc:causal"}), ids)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"0": "eager"}, "`eager` is not a registered pattern"),
        ({"0": "attnc:unheard"}, "`attnc:unheard` is not a registered pattern"),
        ({"0-2": "attnc:causal", "2": "attnc:full"}, "layer 2 is named twice"),
        ({"first": "attnc:causal"}, "`first` names no layers"),
        ({"3-": "attnc:causal"}, "`3-` names no layers"),
    ],
)
def test_choices_that_mean_nothing_are_refused(choice: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_layer(choice)


def test_settings_go_before_defaults_and_before_the_model() -> None:
    assert register(EXAMPLES / "sliding_window.attn", {"window": 3}, name="near") == ("attnc:near",)
    assert register(attnc.compile(TEXT).windowed, {"sliding_window": 3}, name="set") == ("attnc:set",)
    model = model_of(MistralForCausalLM, MistralConfig(**GROUPED, sliding_window=5))
    near = result(model, "attnc:near", tokens())
    torch.testing.assert_close(result(model, "attnc:set", tokens()), near)
    model.config.sliding_window = 3
    for layer in model.model.layers:
        layer.self_attn.config.sliding_window = 3
    torch.testing.assert_close(result(model, "eager", tokens()), near)


def test_tensors_can_be_settings() -> None:
    model = model_of(LlamaForCausalLM, LlamaConfig(**GROUPED))
    assert not torch.allclose(result(model, "attnc:costly", tokens()), result(model, "eager", tokens()))


def test_names_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no pattern has a parameter or an input windw; known: scale, window"):
        register(EXAMPLES / "sliding_window.attn", {"windw": 3})
    with pytest.raises(ValueError, match="a name for one pattern, but there are 6"):
        register(attnc.compile(TEXT), name="several")
    with pytest.raises(attnc.AttnError, match="a layer needs one vector a query"):
        register(attnc.compile("pattern read:\n    out = outer(mean[j](k), mean[j](v))\n"))


def test_gradients_are_those_of_the_models_own_attention() -> None:
    found = []
    for attention in ("attnc:causal", "eager"):
        model = model_of(LlamaForCausalLM, LlamaConfig(**GROUPED))
        model.set_attn_implementation(attention)
        model(tokens(), labels=tokens()).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*found)


def test_what_a_pattern_cannot_see_is_refused() -> None:
    model = model_of(LlamaForCausalLM, LlamaConfig(**GROUPED | {"attention_dropout": 0.25}))
    with pytest.raises(attnc.AttnError, match="a mask of 4 dimensions, which a pattern does not see"):
        result(model, "attnc:causal", tokens(), attention_mask=torch.zeros(2, 1, 13, 13))
    packed = torch.cat([torch.arange(6), torch.arange(7)]).expand(2, -1)
    with pytest.raises(ValueError, match="a mask of its own here, for packed sequences"):
        result(model, "attnc:causal", tokens(), position_ids=packed, use_cache=False)
    static = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(ValueError, match="the queries are not the last tokens of the keys"):
        result(model, "attnc:causal", tokens(), past_key_values=static)
    with pytest.raises(attnc.AttnError, match="drops 25% of its attention weights"):
        model.train()(tokens())


def test_a_cache_that_drops_keys_is_refused() -> None:
    model = model_of(MistralForCausalLM, MistralConfig(**GROUPED, sliding_window=5))
    ids = tokens()
    expected = result(model, "eager", ids)
    for cache, refused in ((DynamicCache(config=model.config), True), (DynamicCache(), False)):
        first = result(model, "attnc:windowed", ids[:, :8], past_key_values=cache)
        torch.testing.assert_close(first, expected[:, :8])
        if refused:
            with pytest.raises(ValueError, match=r"has dropped the first 4 keys .* `past_key_values=DynamicCache"):
                result(model, "attnc:windowed", ids[:, 8:], past_key_values=cache)
        else:
            rest = result(model, "attnc:windowed", ids[:, 8:], past_key_values=cache)
            torch.testing.assert_close(rest, expected[:, 8:])


def test_cross_attention_is_refused() -> None:
    model = model_of(BertModel, BertConfig(**SMALL, is_decoder=True, add_cross_attention=True))
    with pytest.raises(attnc.AttnError, match="the model has cross-attention"):
        result(model, "attnc:causal", tokens(), encoder_hidden_states=torch.zeros(2, 13, 24))


def test_registered_names_are_transformers_own() -> None:
    assert {"attnc:causal", "attnc:sliding_window", "attnc:padded"} <= {*AttentionInterface()}
