"""Which samples a data-parallel rank reads, step by step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch.utils.data import Sampler


class MicroBatchSampler(Sampler[list[int]]):
    """Endless lists of dataset items: this rank's share of each global micro batch, in sequential order.

    A global micro batch is the next micro_batch_size * data_size items, of which rank r takes the r-th contiguous
    block. Past the end of the dataset items start over. `consumed_samples` counts the items of all ranks that earlier
    training has used, so a resumed run goes on where it stopped, whatever its micro batch and number of ranks were.
    """

    def __init__(
        self, num_samples: int, consumed_samples: int, micro_batch_size: int, data_rank: int, data_size: int
    ) -> None:
        self.num_samples = num_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.data_rank = data_rank
        self.data_size = data_size

    def __iter__(self) -> Iterator[list[int]]:
        first = self.consumed_samples + self.data_rank * self.micro_batch_size
        for start in itertools.count(first, self.micro_batch_size * self.data_size):
            yield [item % self.num_samples for item in range(start, start + self.micro_batch_size)]
