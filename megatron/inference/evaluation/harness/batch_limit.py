"""Limits the sequences that go through the model at a time, and takes fewer when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch

from megatron.errors import EnvironmentSetupError
from megatron.loaded_model.loaded_model import LoadedModel
from megatron.mpu.collectives import max_over_ranks
from megatron.mpu.context import ParallelContext

T = TypeVar("T")
U = TypeVar("U")

logger = logging.getLogger(__name__)

CPU_TOKENS = 4096
"""Tokens of an automatic batch on a CPU, which computes no faster with more."""
MOST_SEQUENCES = 1024
"""Sequences of an automatic batch at most."""
MEMORY_SHARE = 0.8
"""Share of the free memory that an automatic batch plans with."""


def out_of_memory(error: RuntimeError) -> bool:
    """Tells whether an allocation on a GPU or a CPU has failed."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class BatchLimit:
    """The largest batch, as a fixed number of sequences or as a number of padded tokens that goes down.

    `together` says that other ranks compute every batch with this one: they wait for a rank that has run out of
    memory, so that it must end instead of trying again.
    """

    def __init__(self, batch_size: int | Literal["auto"], tokens: int = CPU_TOKENS, *, together: bool = False) -> None:
        self.batch_size = batch_size
        self.tokens = tokens
        self.together = together

    def sequences(self, length: int) -> int:
        """Returns the number of sequences of `length` tokens in the next batch."""
        if self.batch_size != "auto":
            return self.batch_size
        return min(max(self.tokens // max(length, 1), 1), MOST_SEQUENCES)

    def shrink(self, sequences: int, length: int) -> None:
        """Lowers the limit below `sequences` sequences of `length` tokens, which were too many.

        Raises EnvironmentSetupError when that is not possible: one sequence was too many, or the size is fixed.
        """
        if self.batch_size != "auto" or self.together or sequences == 1:
            remedy = "Use more tensor-parallel ranks (`model_parallel_size`)." if sequences == 1 else "Lower it."
            raise EnvironmentSetupError(
                f"eval_batch_size={self.batch_size}: out of memory with {sequences} sequences of {length} tokens. "
                f"{remedy}"
            )
        self.tokens = max(sequences // 2, 1) * length
        logger.warning("out of memory with %d sequences of %d tokens: going on with half of them", sequences, length)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def compute_in_batches(
    items: Sequence[T], length: Callable[[T], int], limit: BatchLimit, compute: Callable[[Sequence[T]], Sequence[U]]
) -> list[U]:
    """Computes a result for each item, a batch at a time; `items` are longest first.

    A batch that does not fit into memory is tried again in smaller ones, as far as `limit` can go down.
    """
    results: list[U] = []
    while len(results) < len(items):
        longest = length(items[len(results)])
        batch = items[len(results) : len(results) + limit.sequences(longest)]
        try:
            found = compute(batch)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            found = None
        if found is None:
            # Outside the handler, whose traceback keeps the tensors of the batch that was too large.
            limit.shrink(len(batch), longest)
        else:
            results += found
    return results


def tokens_that_fit(model: LoadedModel, length: int, context: ParallelContext) -> int:
    """Measures how many padded tokens of sequences of up to `length` tokens fit into the GPU's memory.

    One such sequence is scored whole, and the free memory is divided by what it took. The result is the same on all
    tensor-parallel ranks.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    everything = torch.tensor([(0, position, 0) for position in range(length)])
    model.score_tokens(torch.zeros((1, length), dtype=torch.long), everything)
    used = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    fitting = torch.tensor(int(MEMORY_SHARE * free / max(used, 1)) * length, device=model.device)
    return max(-int(max_over_ranks(-fitting, context)), length)
