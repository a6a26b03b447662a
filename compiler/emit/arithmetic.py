"""Arithmetic that every generated module spells the same, as text."""

FLOORS = """@triton.jit
def _floor_div(x, y):
    return (x - _floor_mod(x, y)) // y


@triton.jit
def _floor_mod(x, y):
    return (x % y + y) % y
"""

TANH = """@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
"""
