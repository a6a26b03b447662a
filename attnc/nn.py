"""Layers of torch whose attention is a pattern; see `attnc.runtime.nn`."""

from attnc.runtime.nn import Attention

__all__ = ["Attention"]
