"""The pool of gloo workers that distributed tests run on."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers.distributed import RankFailedError, run_distributed


def total_of_ranks(offset: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return os.getpid(), total


def second_rank_fails() -> None:
    if dist.get_rank() == 1:
        raise KeyError("only here")
    dist.barrier()


def second_rank_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def first_rank_sleeps() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def test_results_come_by_rank_from_workers_that_are_kept() -> None:
    first, second = (run_distributed(total_of_ranks, 2, 10) for _ in range(2))
    assert [float(total) for _, total in first] == [21.0, 21.0]
    assert [pid for pid, _ in first] == [pid for pid, _ in second]


@pytest.mark.parametrize(
    ("function", "message", "timeout"),
    [
        (second_rank_fails, r"rank 1 failed:(.|\n)*second_rank_fails(.|\n)*KeyError: 'only here'", 60.0),
        (second_rank_dies, "rank 1 died, exit code 3", 60.0),
        (first_rank_sleeps, r"ranks \[0\] did not finish in 1.0 s", 1.0),
    ],
)
def test_a_failure_is_told_with_its_rank_and_the_next_call_works(function, message: str, timeout: float) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailedError, match=message):
        run_distributed(function, 2, timeout=timeout)
    assert time.monotonic() - start < 30
    assert [float(total) for _, total in run_distributed(total_of_ranks, 2, 0)] == [1.0, 1.0]
