"""Loads the registered backends for tests, each in the widest number format that it computes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.kernels.backends import Machine, Operation

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCES = {"fp64": 1e-12, "fp32": 2e-5, "bf16": 2e-2, "fp16": 4e-3}
"""Largest error, relative to a tensor's largest element."""


@dataclass(frozen=True)
class LoadedBackend:
    """A backend that runs here."""

    function: Callable[..., Any]
    device: str
    dtype: torch.dtype
    tolerance: float

    def prepared(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns tensors in the backend's number format, on its device."""
        return [tensor.to(self.device, self.dtype) for tensor in tensors]


def load_backend(operation: Operation[Any], name: str) -> LoadedBackend:
    """Loads a backend of an operation; skips the test where it cannot run."""
    backend = operation[name]
    dtype = backend.dtypes[0]
    if obstacle := backend.obstacle(Machine(torch.cuda.is_available(), dtype)):
        pytest.skip(obstacle)
    device = "cuda" if backend.gpu != "irrelevant" and torch.cuda.is_available() else "cpu"
    return LoadedBackend(backend.load(), device, DTYPES[dtype], TOLERANCES[dtype])


def all_backends(operation: Operation[Any]) -> list[Any]:
    """Lists the backends as a test's parameters; what torch.compile takes a minute for is in the full tests only."""
    return [pytest.param(name, marks=pytest.mark.full) if name == "compile" else name for name in operation]


def fast_backends(operation: Operation[Any]) -> list[Any]:
    """Lists the backends that runs use, as `all_backends` does: all but those that are there for comparison alone."""
    compared = [name for name in operation if operation[name].rank is None]
    return [parameter for parameter in all_backends(operation) if parameter not in compared]


def seeded(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Draws normal numbers, the same ones at each call."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def outputs_and_gradients(
    function: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Tensor], probe: Tensor
) -> list[Tensor]:
    """Returns the output and the gradients of every input, for the output's gradient `probe`."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(leaves)
    y.backward(probe)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_near(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    """Asserts that errors stay below `tolerance`, relative to each tensor's largest element."""
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours.cpu().double() - theirs.double()).abs().max() / theirs.abs().max()) <= tolerance
