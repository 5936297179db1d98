"""What rank 0 finds or fails at reaches every rank."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from megatron.errors import CheckpointError, DataError, os_errors_as
from megatron.mpu.agreement import gather_objects, on_first_rank, on_first_rank_meanwhile, rank_and_size
from tests.helpers.distributed import run_distributed


def _agree(missing: Path) -> list[object]:
    rank, size = rank_and_size()
    results: list[object] = [on_first_rank(lambda: (rank, "found")), gather_objects(rank * 10)]

    def refuse() -> None:
        raise DataError("refused")

    with pytest.raises(DataError, match="refused"):
        on_first_rank(refuse)
    with pytest.raises(FileNotFoundError) as caught:
        on_first_rank(missing.read_text)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(missing))
    with (
        pytest.raises(CheckpointError, match="gone: No such file or directory"),
        os_errors_as(CheckpointError, "the checkpoint folder"),
    ):
        on_first_rank(missing.read_text)
    return [size, *results]


def test_all_ranks_learn_what_rank_0_found_or_failed_at(tmp_path: Path) -> None:
    assert run_distributed(_agree, 2, tmp_path / "gone") == [[2, (0, "found"), [0, 10]]] * 2


def _wait_for_rank_0(seconds: float) -> tuple[object, int]:
    waits: list[int] = []

    def slow() -> int:
        time.sleep(seconds)
        return rank_and_size()[0]

    def refuse() -> None:
        time.sleep(seconds)
        raise DataError("refused")

    result = on_first_rank_meanwhile(slow, lambda: waits.append(0), every=0.02)
    with pytest.raises(DataError, match="refused"):
        on_first_rank_meanwhile(refuse, lambda: None, every=0.02)
    return result, len(waits)


def test_ranks_are_told_that_rank_0_still_works() -> None:
    """So that none waits longer than a moment for the next word."""
    (first, waits), (second, others) = run_distributed(_wait_for_rank_0, 2, 0.2)
    assert first == second == 0
    assert waits == others >= 2
    assert _wait_for_rank_0(0.0)[0] == 0


def test_a_process_without_a_group_is_the_only_rank(tmp_path: Path) -> None:
    assert _agree(tmp_path / "gone") == [1, (0, "found"), [0]]


def test_an_error_without_a_file_names_the_place() -> None:
    with pytest.raises(CheckpointError, match="the folder: disk quota"), os_errors_as(CheckpointError, "the folder"):
        raise OSError(errno.EDQUOT, "disk quota")
