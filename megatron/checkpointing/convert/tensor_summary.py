"""Summarizes a checkpoint's parameters: sizes and norms, by global name, whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.checkpointing.states.read_states import read_states
from megatron.checkpointing.states.read_zero_files import MASTER
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
    """Yields every parameter's summary, in the order of the layers; with `optimizer`, also of what it keeps.

    A layer is in memory at a time. Norms are taken in float64. Raises CheckpointError as `read_states` does.
    """
    for layer in read_states(checkpoint, optimizer=optimizer):
        for name, parameter in layer.by_global_name():
            weight, master = parameter.weight, parameter.master
            kept = ({} if master is None else {MASTER: master}) | dict(parameter.moments)
            yield TensorSummary(
                name=name,
                shape=tuple(weight.shape),
                dtype=str(weight.dtype).removeprefix("torch."),
                norm=_norm(weight),
                largest=float(weight.abs().max()),
                not_finite=int((~torch.isfinite(weight)).sum()),
                optimizer_norms={key: _norm(tensor) for key, tensor in kept.items()},
            )


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
