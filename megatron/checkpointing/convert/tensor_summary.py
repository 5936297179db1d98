"""Sizes and norms of what a checkpoint holds, by global name, whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.checkpointing.states.read_optimizer import OptimizerFiles
from megatron.checkpointing.states.weights import checkpoint_layouts, read_layer
from megatron.checkpointing.store.checkpoint import Checkpoint


@dataclass(frozen=True)
class TensorSummary:
    """One parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Of the weights, as torch names it."""
    norm: float
    """Square root of the sum of squares."""
    largest: float
    """Largest magnitude."""
    not_finite: int
    """Elements that are NaN or infinite; norm and largest are not finite either when there are any."""
    optimizer_norms: Mapping[str, float]
    """The norms of what the optimizer keeps of it, by DeepSpeed's names: fp32, exp_avg, exp_avg_sq."""


def summarize_tensors(checkpoint: Checkpoint, *, optimizer: bool) -> Iterator[TensorSummary]:
    """Every parameter, in the order of the layers; with `optimizer`, what the optimizer keeps of it as well.

    A layer is in memory at a time. Norms are taken in float64. Raises CheckpointError when a file is missing, damaged
    or unsafe, or does not hold what the configuration describes.
    """
    states = OptimizerFiles(checkpoint) if optimizer else None
    for layout in checkpoint_layouts(checkpoint):
        kept = {} if states is None else states.read_layer(layout)
        for name, weight in read_layer(checkpoint, layout).items():
            yield TensorSummary(
                name=name,
                shape=tuple(weight.shape),
                dtype=str(weight.dtype).removeprefix("torch."),
                norm=_norm(weight),
                largest=float(weight.abs().max()),
                not_finite=int((~torch.isfinite(weight)).sum()),
                optimizer_norms={key: _norm(tensor) for key, tensor in kept.get(name, {}).items()},
            )


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
