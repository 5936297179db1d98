"""What rank 0 finds or fails at reaches every rank."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from megatron.errors import CheckpointError, DataError, os_errors_as
from megatron.mpu.agreement import gather_objects, on_first_rank, rank_and_size
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


def test_a_process_without_a_group_is_the_only_rank(tmp_path: Path) -> None:
    assert _agree(tmp_path / "gone") == [1, (0, "found"), [0]]


def test_an_error_without_a_file_names_the_place() -> None:
    with pytest.raises(CheckpointError, match="the folder: disk quota"), os_errors_as(CheckpointError, "the folder"):
        raise OSError(errno.EDQUOT, "disk quota")
