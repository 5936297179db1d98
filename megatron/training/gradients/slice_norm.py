"""Takes the norm of all gradients from the parts that data-parallel ranks hold of their sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from deepspeed.runtime.constants import PIPE_REPLICATED
from torch import Tensor, nn

from megatron.checkpointing.engine.flat_partitions import Fragment
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import parameter_spec

WIDENED_AT_ONCE = 2**17
"""Gradient elements of which a float64 copy is made at a time [elements]: 1 MiB, which stays in a CPU's cache."""


class SliceNorm:
    """The ranges of a rank's slices, and whether each counts on this rank."""

    def __init__(self, groups: Sequence[Sequence[Fragment]], context: ParallelContext) -> None:
        """Takes the fragments of all parameters, by optimizer group."""
        self._ranges = [list(_ranges(fragments, context)) for fragments in groups]

    def square(self, slices: Sequence[Tensor]) -> Tensor:
        """Returns this rank's part of the squared norm, float64: the parts of all ranks sum to it.

        A gradient that several ranks hold alike counts on one of them: replicated weights on tensor rank 0, the
        embedding of a tied head on the embedding's stage. The others add 0, or NaN where it is not finite, so that no
        rank takes the step.
        """
        total = torch.zeros((), dtype=torch.float64, device=slices[0].device)
        for ranges, gradient in zip(self._ranges, slices, strict=True):
            for place, counts in ranges:
                for part in torch.split(gradient[place], WIDENED_AT_ONCE):
                    total += counts * torch.linalg.vector_norm(part, dtype=torch.float64).square()
        return total


def _ranges(fragments: Sequence[Fragment], context: ParallelContext) -> Iterator[tuple[slice, float]]:
    """Yields the places of neighbouring fragments that count alike, as one. Padding is in none."""
    held = [fragment for fragment in fragments if fragment.size]
    for counts, run in groupby(held, key=lambda fragment: _counts(fragment.parameter, context)):
        places = [fragment.place for fragment in run]
        yield slice(places[0].start, places[-1].stop), float(counts)


def _counts(parameter: nn.Parameter, context: ParallelContext) -> bool:
    first = parameter_spec(parameter).shard_dim is not None or context.tensor_rank == 0
    return first and not getattr(parameter, PIPE_REPLICATED)
