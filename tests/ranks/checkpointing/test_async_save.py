"""Saves that are written while training goes on make the checkpoints of synchronous ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.async_saves import assert_same_run, slow, write
from tests.helpers.faults import slow_writes
from tests.helpers.records import records
from tests.helpers.runs import train
from tests.helpers.tensor_files import assert_same_checkpoint


@pytest.mark.parametrize("changes", [{}, {"precision": "bfloat16", "pipe_parallel_size": 2}], ids=["fp32", "bf16"])
def test_checkpoints_are_those_of_synchronous_saves(
    changes: dict[str, Any], synchronous: Path, dataset: Path, tmp_path: Path
) -> None:
    theirs = synchronous
    if changes:
        whole = write(tmp_path / "whole", dataset, async_save=False, extra_save_iters=[0], **changes)
        waited = train(whole, ranks=2)
        assert waited.index("saved") < waited.index("step 1/6")
        theirs = whole.with_suffix("")
    config = write(tmp_path / "asynchronous", dataset, extra_save_iters=[0], **changes)
    output = train(config, ranks=2, before=slow)
    ours = config.with_suffix("")
    assert_same_run(ours, theirs)
    for step in (0, 2, 4):
        assert_same_checkpoint(ours / f"global_step{step}", theirs / f"global_step{step}")
    assert output.index("saved") > output.index("step 1/6"), "training did not go on"
    for path in (ours, theirs):
        assert (path / "latest").read_text() == "global_step6\n"
        waits = records(path, "train/save_wait_seconds")
        assert {1, 3, 5} <= set(waits) and all(seconds > 0 for seconds in waits.values())


def test_a_save_waits_for_the_one_before(dataset: Path, tmp_path: Path, synchronous: Path) -> None:
    config = write(tmp_path, dataset, checkpoint_factor=1)
    output = train(config, ranks=2, before=slow_writes, arguments=(0.1, 1))
    # A step on a busy machine may take longer than the writing.
    assert output.count("waits for the one before") >= 2
    run = config.with_suffix("")
    assert sorted(path.name for path in run.glob("global_step*")) == [f"global_step{step}" for step in range(1, 7)]
    assert_same_checkpoint(run / "global_step6", synchronous / "global_step6")
