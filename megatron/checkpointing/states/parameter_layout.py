"""Split of every parameter over files and ranks, as its module describes it.

The layers are built on the meta device, and what their parameters know of themselves is read off. There is no table
beside the modules that could disagree with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.config.sections.model import ModelConfig
from megatron.errors import CheckpointError
from megatron.model.causal_lm import VocabSize, layer_entries
from megatron.model.embedding import TiedHead
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import ParameterSpec, parameter_spec


@dataclass(frozen=True)
class LayerLayout:
    """The parameters of one pipeline layer, which DeepSpeed keeps in one file per tensor-parallel rank."""

    index: int
    """Pipeline layer, as in the file's name."""
    parameters: Mapping[str, ParameterSpec]
    """By the name that a parameter has in the file."""
    name: str
    """Start of their global names, such as `layers.3`."""

    def global_name(self, local_name: str) -> str:
        """Returns the parameter's name in the whole model."""
        return f"{self.name}.{local_name}"


def layer_layouts(model: ModelConfig, vocab: VocabSize) -> list[LayerLayout]:
    """Returns the layers that own parameters, in order; a tied head owns none."""
    layouts = []
    with torch.device("meta"):
        for index, entry in enumerate(layer_entries(model, vocab, ParallelContext.single())):
            if entry.module is TiedHead:
                continue
            named = entry.build().named_parameters()
            layouts.append(LayerLayout(index, {name: parameter_spec(p) for name, p in named}, entry.name))
    return layouts


@dataclass(frozen=True)
class ParallelSizes:
    """Ranks by parallel dimension."""

    tensor: int = 1
    pipe: int = 1
    data: int = 1


def shard_shape(spec: ParameterSpec, tensor_size: int) -> tuple[int, ...]:
    """Returns the shape of each tensor-parallel rank's part.

    Raises CheckpointError when the parameter does not split evenly.
    """
    if spec.shard_dim is None:
        return spec.full_shape
    total = spec.full_shape[spec.shard_dim]
    if total % tensor_size:
        raise CheckpointError(f"{total} rows or columns do not split evenly over {tensor_size} tensor-parallel ranks")
    return tuple(size // tensor_size if dim == spec.shard_dim else size for dim, size in enumerate(spec.full_shape))


def merge(parts: Sequence[Tensor], spec: ParameterSpec) -> Tensor:
    """Joins the parts of all tensor-parallel ranks, in their order, to the whole parameter.

    Raises CheckpointError when a part has another shape than its share, or replicas differ.
    """
    expected = shard_shape(spec, len(parts))
    for rank, part in enumerate(parts):
        if tuple(part.shape) != expected:
            raise CheckpointError(f"tensor-parallel rank {rank} has shape {tuple(part.shape)}, not {expected}")
    if len(parts) == 1:
        return parts[0]
    if spec.shard_dim is not None:
        return torch.cat(list(parts), dim=spec.shard_dim)
    for rank, part in enumerate(parts[1:], start=1):
        if not torch.equal(part, parts[0]):
            raise CheckpointError(f"tensor-parallel ranks 0 and {rank} have different values of a replicated parameter")
    return parts[0]


def split(whole: Tensor, spec: ParameterSpec, tensor_size: int) -> list[Tensor]:
    """Splits a whole parameter into the parts of all tensor-parallel ranks, in their order, as views.

    Raises CheckpointError when the parameter does not split evenly.
    """
    shard_shape(spec, tensor_size)
    return [whole] * tensor_size if spec.shard_dim is None else list(whole.tensor_split(tensor_size, spec.shard_dim))


def fit_vocabulary(whole: Tensor, spec: ParameterSpec, vocab_size: int) -> Tensor:
    """Returns a whole parameter with as many vocabulary rows as `spec` says: tokens' `vocab_size` rows, and zeros.

    A parameter without such rows comes back as it is. The padding must be masked in the model, or its rows count.
    Raises CheckpointError when the shapes differ in anything else.
    """
    if tuple(whole.shape) == spec.full_shape:
        return whole
    rows, *row = spec.full_shape
    if list(whole.shape[1:]) != row or min(rows, whole.shape[0]) < vocab_size:
        raise CheckpointError(f"a parameter has shape {tuple(whole.shape)}; this run's has {spec.full_shape}")
    fitted = whole.new_zeros(spec.full_shape)
    fitted[:vocab_size] = whole[:vocab_size]
    return fitted
