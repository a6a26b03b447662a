"""`.attn` patterns as attention of transformers' models; see `attnc.runtime.integrations.transformers`."""

from attnc.runtime.integrations.transformers import by_layer, register

__all__ = ["by_layer", "register"]
