"""Ranks share the global micro batches without gap or overlap, and resume where training stopped."""

from itertools import islice

import pytest

from megatron.data.micro_batch import MicroBatchSampler


def take(
    steps: int, num_samples: int = 1000, consumed: int = 0, micro: int = 2, rank: int = 0, size: int = 1
) -> list[list[int]]:
    return list(islice(MicroBatchSampler(num_samples, consumed, micro, rank, size), steps))


def test_ranks_take_contiguous_blocks() -> None:
    assert take(2, micro=3, rank=0, size=2) == [[0, 1, 2], [6, 7, 8]]
    assert take(2, micro=3, rank=1, size=2) == [[3, 4, 5], [9, 10, 11]]


@pytest.mark.parametrize(("micro", "size"), [(12, 1), (1, 1), (3, 4), (6, 2), (2, 3)])
def test_any_layout_reads_the_same_samples(micro: int, size: int) -> None:
    """48 samples as any product of micro batch, ranks and steps."""
    per_rank = [take(48 // (micro * size), micro=micro, rank=rank, size=size) for rank in range(size)]
    assert [item for step in zip(*per_rank, strict=True) for block in step for item in block] == list(range(48))


def test_goes_on_where_it_stopped_with_another_layout() -> None:
    first = take(5, micro=4)
    then = zip(
        take(2, consumed=20, micro=2, rank=0, size=2), take(2, consumed=20, micro=2, rank=1, size=2), strict=True
    )
    items = [item for batch in first for item in batch] + [item for step in then for block in step for item in block]
    assert items == list(range(28))


def test_starts_over_at_the_end() -> None:
    assert take(4, num_samples=5, micro=2) == [[0, 1], [2, 3], [4, 0], [1, 2]]
    assert take(1, num_samples=5, consumed=13, micro=2) == [[3, 4]]
