"""Workers change neither order nor errors, and leave signals to the parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.utils.data import Dataset

from megatron.data.micro_batch import micro_batches
from megatron.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


class Squares(Dataset[npt.NDArray[np.int64]]):
    """Item i is [i, i * i]; item `bad` raises a DataError, and `broken` what nobody expects."""

    def __init__(self, length: int, bad: int | None = None, broken: int | None = None) -> None:
        self.length = length
        self.bad = bad
        self.broken = broken

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> npt.NDArray[np.int64]:
        if item == self.bad:
            raise DataError(f"corpus.bin: document {item} is bad")
        if item == self.broken:
            raise ZeroDivisionError
        return np.array([item, item * item])


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


def test_workers_survive_signals_to_the_process_group() -> None:
    others = multiprocessing.active_children()
    loader = micro_batches(Squares(50), consumed_samples=0, micro_batch_size=1, data_rank=0, data_size=1, num_workers=2)
    assert [int(next(loader)[0, 0]) for _ in range(4)] == [0, 1, 2, 3]
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker.pid or 0, number)
    assert [int(next(loader)[0, 0]) for _ in range(20)] == list(range(4, 24))
    assert all(worker.is_alive() for worker in workers)
    loader.close()  # type: ignore[attr-defined]
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("broken", [None, 0], ids=["in between", "after an unexpected error"])
def test_process_ends_although_workers_ignore_signals(broken: int | None) -> None:
    """multiprocessing would wait for them for ever, so the loader ends them itself."""
    program = f"""
        from tests.data.test_loader import Squares
        from megatron.data.micro_batch import micro_batches
        batches = micro_batches(
            Squares(9, broken={broken}), consumed_samples=0, micro_batch_size=1, data_rank=0, data_size=1, num_workers=2
        )
        next(batches)
        raise SystemExit(3)
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, timeout=60, check=False, capture_output=True
    )
    assert finished.returncode == (3 if broken is None else 1), finished.stderr
