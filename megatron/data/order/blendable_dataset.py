"""Several datasets read as one, in proportion to their weights, in NeoX's order, index for index.

NeoX serves item i from the dataset that lags furthest behind its share: the first k with the largest
w_k * max(i, 1) - c_k, in double precision, where c_k counts what k has served before. Each choice depends on all
earlier ones, so there is no closed form; but the counts at any point can be guessed closely. The items are cut into
blocks that start from guessed counts and run side by side, one vectorized step for all blocks. A block whose guess
differs from what its predecessor ended with runs again from there, until every block starts exactly where its
predecessor ended. The result is therefore exact; the guesses decide the time alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from megatron.data.order.gpt_dataset import GPTDataset

_MAX_BLOCKS = 8192
_CACHED_NUMBERS = 1 << 15
"""Numbers in double precision that stay in a core's cache."""

MIN_BLOCK_LENGTH = 64
"""Items that a block holds at least."""


@dataclass(frozen=True)
class BlendOrder:
    """The dataset that serves each item, and the number of that dataset's items before it."""

    choices: npt.NDArray[np.uint8]
    """Dataset of each item [items]."""

    block_length: int
    """Distance between two entries of `counts_before` [items]."""

    counts_before: npt.NDArray[np.int64]
    """Number of items that each dataset has served before each block [blocks, datasets]."""

    def __getitem__(self, item: int) -> tuple[int, int]:
        """Returns the dataset of an item of the blend, and the item's number in that dataset."""
        choice = int(self.choices[item])
        block = item // self.block_length
        since = self.choices[block * self.block_length : item]
        return choice, int(self.counts_before[block, choice]) + int(np.count_nonzero(since == choice))


def blend_order(
    weights: npt.NDArray[np.float64], num_items: int, *, min_block_length: int = MIN_BLOCK_LENGTH
) -> BlendOrder:
    """Computes NeoX's order of `num_items` items of datasets with `weights` that sum to 1. Takes one byte per item.

    The length of the blocks changes the time that it takes, and nothing else.
    """
    num_blocks = min(_MAX_BLOCKS, max(1, num_items // min_block_length))
    length = -(-num_items // num_blocks)
    starts = np.arange(num_blocks, dtype=np.int64) * length
    before = _guess_counts(weights, starts)
    after = np.empty_like(before)
    choices = np.empty((num_blocks, length), dtype=np.uint8)
    pending = np.arange(num_blocks)
    while len(pending):
        choices[pending], after[:, pending] = _serve(weights, starts[pending], before[:, pending], length)
        pending = 1 + np.flatnonzero((before[:, 1:] != after[:, :-1]).any(axis=0))
        before[:, pending] = after[:, pending - 1]
    return BlendOrder(choices.reshape(-1)[:num_items], length, before.T.astype(np.int64))


def _guess_counts(weights: npt.NDArray[np.float64], items: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Guesses the counts after `items` items by the largest-remainder apportionment: [datasets, len(items)].

    Exact for 0 items, where the first block starts.
    """
    shares = weights[:, None] * items
    counts = np.floor(shares)
    missing = items - counts.sum(axis=0)
    rank_of_remainder = np.argsort(np.argsort(counts - shares, axis=0, kind="stable"), axis=0)
    counts += rank_of_remainder < missing
    return counts


def _serve(
    weights: npt.NDArray[np.float64], starts: npt.NDArray[np.int64], counts: npt.NDArray[np.float64], length: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """Serves `length` items in every block: returns choices [blocks, length] and the counts then [datasets, blocks]."""
    counts = np.ascontiguousarray(counts.T)
    choices = np.empty((len(starts), length), dtype=np.uint8)
    side_by_side = max(1, _CACHED_NUMBERS // len(weights))
    for first in range(0, len(starts), side_by_side):
        blocks = slice(first, first + side_by_side)
        served, begins = counts[blocks], starts[blocks].astype(np.float64)[:, None]
        rows = np.arange(len(served))
        deficits = np.empty_like(served)
        for step in range(length):
            np.multiply(np.maximum(begins + step, 1.0), weights, out=deficits)
            np.subtract(deficits, served, out=deficits)
            choice = deficits.argmax(axis=1)  # the first of equals wins
            choices[blocks, step] = choice
            served[rows, choice] += 1
    return choices, counts.T


class BlendableDataset(Dataset[npt.NDArray[np.int64]]):
    """Items of several datasets, interleaved by weight.

    As in NeoX the length is the sum of the parts' lengths, so parts with much weight are read past their end and start
    over. Items beyond the length wrap. Weights need not sum to 1.
    """

    def __init__(self, datasets: Sequence[GPTDataset], weights: Sequence[float]) -> None:
        self.datasets = datasets
        shares = np.array(weights, dtype=np.float64)
        self.order = blend_order(shares / shares.sum(), sum(len(dataset) for dataset in datasets))

    def __len__(self) -> int:
        return len(self.order.choices)

    def __getitem__(self, item: int) -> npt.NDArray[np.int64]:
        dataset, item_of_dataset = self.order[item % len(self)]
        return self.datasets[dataset][item_of_dataset]
