"""AdamW by plain operations, over parts of a tensor that stay in a processor's cache from one operation to the next.

ZeRO-1 hands an optimizer one flat tensor of all weights. torch's AdamW takes it through memory once for each of its
eight operations, and takes new memory of its size for two of them. The same operations over a part at a time take it
through memory once and give the same bits, because no element depends on another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

PART = 2**17
"""Elements of a part for each of torch's threads: the six tensors of one fill 3 MiB."""


class CacheBlockedAdamW(torch.optim.AdamW):
    """torch's AdamW, whose steps go through tensors in host memory a part at a time.

    Arguments, state and results are those of `torch.optim.AdamW`. A fused step, or one on a GPU, is not cut.
    """

    def _init_group(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        averages: list[Tensor],
        squares: list[Tensor],
        largest_squares: list[Tensor],
        steps: list[Tensor],
    ) -> bool:
        """Fills the lists with the tensors of a step, as torch's AdamW does, and replaces tensors by their parts."""
        columns = (weights, gradients, averages, squares, largest_squares)
        is_complex: bool = super()._init_group(group, *columns, steps)  # type: ignore[no-untyped-call]
        if group["fused"] or not weights:
            return is_complex
        used = [column for column in columns if column]
        parts, counted = [], []
        for step, tensors in zip(steps, zip(*used, strict=True), strict=True):
            for number, part in enumerate(_parts(tensors)):
                parts.append(part)
                # Every part counts the step, and only the first one for the tensor.
                counted.append(step.clone() if number else step)
        for column, cut in zip(used, zip(*parts, strict=True), strict=True):
            column[:] = cut
        steps[:] = counted
        return is_complex


def _parts(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yields the parts of tensors of one shape, each with those of the others that belong to it."""
    size = PART * torch.get_num_threads()
    if all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors):
        yield from zip(*(torch.split(tensor.view(-1), size) for tensor in tensors), strict=True)
    else:
        yield tuple(tensors)
