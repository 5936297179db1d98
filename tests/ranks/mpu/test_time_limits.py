"""The time that a collective may take, in groups that were made after the default one as well."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
from torch import distributed

from megatron.mpu.process_group import limit_all_groups
from tests.helpers.distributed import run_distributed


def _wait_in_vain() -> float:
    group = distributed.new_group([0, 1])
    limit_all_groups(timedelta(seconds=1))
    begin = time.monotonic()
    try:
        if distributed.get_rank() == 0:
            with pytest.raises(RuntimeError, match=r"(?i)timed out|timeout"):
                distributed.all_reduce(torch.ones(3), group=group)
    finally:
        waited = time.monotonic() - begin
        limit_all_groups(timedelta(minutes=30))
    distributed.barrier()
    return waited


def test_a_new_group_has_the_limit_of_the_run() -> None:
    """torch gives it 30 minutes."""
    waited, _ = run_distributed(_wait_in_vain, 2)
    assert 0.9 < waited < 60
