"""A state that no kernel carries on a GPU is said to run by torch operators."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from attnc.runtime.compute.arrays import Frame
from attnc.runtime.steps.carrying import NoKernelWarning, on_kernels

FRAME = Frame({}, {}, {}, {}, 0, {}, torch.float32, torch.device("cuda"))


def test_a_gpu_without_a_kernel_is_said_once() -> None:
    with pytest.warns(NoKernelWarning, match="3_carry runs by torch operators"):
        assert not on_kernels("3_carry", FRAME, fits=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not on_kernels("3_carry", FRAME, fits=False)
        assert on_kernels("4_carry", FRAME, fits=True)
        assert not on_kernels("5_carry", replace(FRAME, device=torch.device("cpu")), fits=False)
