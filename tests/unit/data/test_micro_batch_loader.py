"""Workers change neither order nor errors."""

from itertools import islice

import pytest
import torch

from megatron.data.micro_batch import micro_batches
from megatron.errors import DataError
from tests.helpers.squares import Squares


def first_items(batches: int, num_workers: int, consumed: int = 0) -> list[list[int]]:
    loader = micro_batches(
        Squares(50), consumed_samples=consumed, micro_batch_size=3, data_rank=1, data_size=2, num_workers=num_workers
    )
    return [batch[:, 0].tolist() for batch in islice(loader, batches)]


def test_workers_keep_the_order() -> None:
    """Beyond one epoch, and from the middle."""
    want = [[(3 + 6 * step + i) % 50 for i in range(3)] for step in range(25)]
    assert first_items(25, num_workers=0) == want
    assert first_items(25, num_workers=2) == want
    assert first_items(15, num_workers=2, consumed=60) == want[10:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_tensors_of_tokens(num_workers: int) -> None:
    loader = micro_batches(
        Squares(10), consumed_samples=0, micro_batch_size=4, data_rank=0, data_size=1, num_workers=num_workers
    )
    batch = next(loader)
    assert batch.dtype == torch.int64
    assert batch.tolist() == [[0, 0], [1, 1], [2, 4], [3, 9]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_error_of_a_dataset_arrives_as_it_was(num_workers: int) -> None:
    loader = micro_batches(
        Squares(50, bad=7), consumed_samples=0, micro_batch_size=2, data_rank=0, data_size=1, num_workers=num_workers
    )
    assert len(list(islice(loader, 3))) == 3
    with pytest.raises(DataError) as caught:
        next(loader)
    assert str(caught.value) == "corpus.bin: document 7 is bad"


def test_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first_items(2, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)
