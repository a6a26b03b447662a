"""The text of the chunked kernels: one emitter writes every variant."""

from __future__ import annotations

import ast
import re

import pytest

from attnc.compiler.composition import Carry, Extent, Recur
from attnc.compiler.emit.chunked import chunked_kernels, chunked_text, variant_of
from attnc.compiler.emit.chunked_kernel import Variant
from attnc.compiler.schedule_chunked import chunk_length, chunked_shape, segments

DECAYS = ("none", "scalar", "channel")
SUMS = [
    Variant(decay, extent, total, grouped)
    for extent in ("lag", "period", "all")
    for decay in (DECAYS if extent != "all" else DECAYS[:1])
    for total in (False, True)
    for grouped in (False, True)
]
RECURRENCES = [Variant(decay, rule=rule) for decay in DECAYS for rule in ("delta", "dplr")]


@pytest.mark.parametrize("variant", [*SUMS, *RECURRENCES], ids=str)
def test_a_kernel_has_the_arguments_that_it_reads(variant: Variant) -> None:
    text = chunked_text(variant)
    functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    for kernel in chunked_kernels(variant):
        function = functions[kernel.name]
        names = [argument.arg for argument in function.args.args]
        assert names == [*(one.name for one in kernel.arguments), *kernel.constants]
        read = {node.id for part in function.body for node in ast.walk(part) if isinstance(node, ast.Name)}
        assert [name for name in names if name not in read] == []
        stored = {
            node.id
            for part in function.body
            for node in ast.walk(part)
            if isinstance(getattr(node, "ctx", None), ast.Store) and isinstance(node, ast.Name)
        }
        known = {*names, *stored, "tl", "range", "_load_tile", "LOG2E", "float"}
        assert read - known == set(), "a name that nothing defines"


@pytest.mark.parametrize("variant", [*SUMS, *RECURRENCES], ids=str)
def test_every_sum_has_one_owner(variant: Variant) -> None:
    assert "atomic" not in chunked_text(variant)


def test_what_a_variant_does_not_need_is_not_written() -> None:
    plain = chunked_text(Variant())
    assert "exp2" not in plain
    assert "norm" not in plain
    assert "member" not in plain
    assert "member" in chunked_text(Variant(grouped=True))
    assert "tl.trans(keys)" not in outputs(Variant(extent="all"))


def outputs(variant: Variant) -> str:
    return next(kernel.text for kernel in chunked_kernels(variant) if kernel.name == "outputs")


@pytest.mark.parametrize("variant", [*SUMS, *RECURRENCES], ids=str)
def test_only_differences_of_prefix_sums_are_exponents(variant: Variant) -> None:
    """exp2 takes a prefix sum from the chunk's start, or a later one less an earlier one."""
    exponents = set(re.findall(r"tl\.exp2\((.*?)\)[\[\s)*\n.]", chunked_text(variant)))
    for exponent in exponents:
        assert exponent in {"prefix", "prefix_before", "prefix_last"} or " - " in exponent


def test_variants_of_steps() -> None:
    carry = Carry("out", "q", "k", "v", Extent("lag"), decay="g", total="n")
    assert variant_of(carry, channel=True, grouped=True) == Variant("channel", "lag", True, True)
    assert variant_of(carry, channel=False, grouped=False).decay == "scalar"
    recur = Recur("out", "q", "k", "v", None, "x", "y")
    assert variant_of(recur, channel=False, grouped=False) == Variant(rule="dplr")
    assert variant_of(recur, channel=False, grouped=False, delta=True).rule == "delta"


def test_shapes_fit_what_they_hold() -> None:
    for variant in (*SUMS, *RECURRENCES):
        for single in (False, True):
            assert chunk_length(variant, single) in (32, 64)
            for kernel in chunked_kernels(variant):
                shape = chunked_shape(kernel.name, variant, 128, 32, single)
                assert min(shape.block_f, shape.block_e) >= 16
                if variant.rule != "sum" and kernel.name.startswith("states"):
                    assert shape.block_f == 128, "a recurrence keeps its features whole"


def test_segments_where_a_pass_in_order_leaves_processors_idle() -> None:
    assert segments(programs=128, chunks=1000, processors=132) == 1
    assert segments(programs=8, chunks=1000, processors=132) == 33
    assert segments(programs=8, chunks=20, processors=132) == 2, "a segment has several chunks"
    assert segments(programs=1, chunks=1, processors=132) == 1
