"""Ranks that race for an index build it once."""

import logging
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron.data.order import index_cache
from tests.helpers.distributed import run_distributed
from tests.helpers.index_requests import assert_right, read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    assert_right(read(path))
    return path


def _build_count(folder: Path) -> int:
    """How often this rank built the index that all ranks ask for at once."""
    built: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: built.append(record.getMessage())  # type: ignore[method-assign]
    index_cache.logger.addHandler(handler)
    index_cache.logger.setLevel(logging.INFO)
    dist.barrier()
    try:
        assert_right(read(folder))
    finally:
        index_cache.logger.removeHandler(handler)
    return sum("built" in message for message in built)


def test_racing_ranks_build_it_once(tmp_path: Path) -> None:
    counts = run_distributed(_build_count, 2, tmp_path / "cache")
    assert sum(counts) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 5
