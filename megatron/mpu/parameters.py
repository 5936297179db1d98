"""Parameters that know their full shape, their split and their initializer, apart from the memory that holds them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from megatron.errors import ConfigError
from megatron.mpu.context import ParallelContext

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Number formats of parameters by their names in the configuration (`precision.dtype`)."""

Initializer = Callable[[Tensor, torch.Generator], object]
"""Fills a whole float32 tensor in place from a generator."""


@dataclass(frozen=True)
class ParameterSpec:
    """Facts of a parameter that do not depend on the layout that holds it."""

    full_shape: tuple[int, ...]
    """Shape over all tensor-parallel ranks."""
    shard_dim: int | None
    """Dimension that is split evenly over the tensor-parallel ranks; None for a replicated parameter."""
    initializer: Initializer
    decays: bool
    """Whether weight decay applies: yes for every matrix, no for norms and biases."""
    is_embedding_or_head: bool = False
    """Whether its rows stand for tokens or positions."""

    @property
    def is_hidden_matrix(self) -> bool:
        """Tells whether it is a matrix between the embedding and the head."""
        return len(self.full_shape) == 2 and not self.is_embedding_or_head


def shard_size(total: int, context: ParallelContext, what: str) -> int:
    """Divides `total` by the tensor-parallel size.

    Raises ConfigError, naming the nearest valid values of `what`, when that leaves a remainder.
    """
    size = context.tensor_size
    if total % size:
        below = total // size * size
        nearest = f"{below} or {below + size}" if below else f"{size}"
        raise ConfigError(
            f"{what}: {total} does not split over model_parallel_size={size}: each tensor-parallel rank holds an "
            f"equal share. Nearest valid: {nearest}."
        )
    return total // size


def new_parameter(
    full_shape: tuple[int, ...],
    initializer: Initializer,
    context: ParallelContext,
    *,
    what: str,
    shard_dim: int | None = None,
    decays: bool = True,
    is_embedding_or_head: bool = False,
) -> nn.Parameter:
    """Builds this rank's share of a parameter, unset, on the default device. `what` names it in errors.

    Raises ConfigError when `shard_dim` does not split evenly.
    """
    shape = list(full_shape)
    if shard_dim is not None:
        shape[shard_dim] = shard_size(full_shape[shard_dim], context, what)
    parameter = nn.Parameter(torch.empty(shape))
    sharded = shard_dim is not None and context.tensor_size > 1
    parameter.__dict__.update(
        spec=ParameterSpec(full_shape, shard_dim, initializer, decays, is_embedding_or_head),
        # DeepSpeed counts an unmarked parameter's gradient norm on tensor rank 0 only; it reads both names.
        model_parallel=sharded,
        tensor_model_parallel=sharded,
    )
    return parameter


def parameter_spec(parameter: nn.Parameter) -> ParameterSpec:
    """Returns the specification that `new_parameter` attached; it survives changes of dtype and device in place."""
    return cast(ParameterSpec, parameter.__dict__["spec"])


def initialize_parameters(named: Iterator[tuple[str, nn.Parameter]], seed: int, context: ParallelContext) -> None:
    """Sets parameters from their global names, so that every layout starts from the same full weights."""
    for name, parameter in named:
        spec = parameter_spec(parameter)
        with torch.no_grad():
            parameter.copy_(local_shard(initial_values(spec, seed, name), spec.shard_dim, context))


def initial_values(spec: ParameterSpec, seed: int, name: str) -> Tensor:
    """Draws the initial values of the parameter `name`, a global name: whole, in float32, on the CPU.

    Each parameter has a generator of its own, seeded by (seed, name).
    """
    values = torch.empty(spec.full_shape, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        spec.initializer(values, named_generator(seed, name))
    return values


def named_generator(seed: int, name: str) -> torch.Generator:
    """Builds the generator on the CPU of what is drawn under a name, the same in every layout."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def local_shard(full: Tensor, shard_dim: int | None, context: ParallelContext) -> Tensor:
    """Returns this tensor-parallel rank's share of a whole tensor, as a view."""
    if shard_dim is None:
        return full
    return full.tensor_split(context.tensor_size, dim=shard_dim)[context.tensor_rank]


def zeros(tensor: Tensor, generator: torch.Generator) -> None:
    """Initializes a bias."""
    tensor.zero_()


def ones(tensor: Tensor, generator: torch.Generator) -> None:
    """Initializes the scale of a norm."""
    tensor.fill_(1.0)
