"""Saves that are written while training goes on: the same checkpoints, and the same safety."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.faults import limit_file_size_in_save, not_finite, slow_writes, watch_save
from tests.helpers.runs import run_ranks, start_ranks, train
from tests.helpers.tensor_files import assert_same_checkpoint
from tests.integration import test_kill
from tests.integration.conftest import records

CHANGES: dict[str, Any] = {"async_save": True, "keep_last_n_checkpoints": None}
SAVE = 4
KILLED = [-signal.SIGKILL] * 2
SLOW = 0.02
"""Seconds before each of the ten files: a save takes longer than a step."""


def write(folder: Path, dataset: Path, **changes: Any) -> Path:
    """A run of six steps that saves every second one."""
    return test_kill.write(folder, dataset, **(CHANGES | changes))


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run that nobody touches, whose saves are waited for."""
    config = write(tmp_path_factory.mktemp("synchronous"), dataset, async_save=False)
    train(config, ranks=2)
    return config.with_suffix("")


def assert_same_run(ours: Path, theirs: Path, steps: int = 6) -> None:
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    assert_same_checkpoint(ours / f"global_step{steps}", theirs / f"global_step{steps}")
    for key in ("train/lm_loss", "valid/lm_loss", "test/lm_loss"):
        assert records(ours, key) == records(theirs, key)


def slow(*fault: Any) -> None:
    """Slow writes, and a fault with its arguments."""
    slow_writes(SLOW)
    if fault:
        function, *arguments = fault
        function(*arguments)


@pytest.mark.parametrize("changes", [{}, {"precision": "bfloat16", "pipe_parallel_size": 2}], ids=["fp32", "bf16"])
def test_checkpoints_are_those_of_synchronous_saves(changes: dict[str, Any], dataset: Path, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", dataset, async_save=False, extra_save_iters=[0], **changes)
    config = write(tmp_path / "asynchronous", dataset, extra_save_iters=[0], **changes)
    waited = train(whole, ranks=2)
    output = train(config, ranks=2, before=slow)
    ours, theirs = config.with_suffix(""), whole.with_suffix("")
    assert_same_run(ours, theirs)
    for step in (0, 2, 4):
        assert_same_checkpoint(ours / f"global_step{step}", theirs / f"global_step{step}")
    assert waited.index("saved") < waited.index("step 1/6")
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


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.full)])
def test_killed_before_things_that_a_save_does(every: int, dataset: Path, tmp_path: Path, synchronous: Path) -> None:
    """Of what rank 0 does, from the making of the folder to the end of its publication."""
    events = tmp_path / "events"
    train(write(tmp_path / "untouched", dataset), ranks=2, before=slow, arguments=(watch_save, SAVE, events, None))
    lines = events.read_text().splitlines()
    assert any("layer_02" in line for line in lines)
    last = lines.index("os.rename ./latest.tmp")
    for number in range(1, last + 2, every):
        config = write(tmp_path / str(number), dataset)
        killed = run_ranks(config, ranks=2, before=slow, arguments=(watch_save, SAVE, None, number))
        assert killed.codes == KILLED, lines[number]
        assert_loads(config, lines[number])
        train(config, ranks=2)
        assert_same_run(config.with_suffix(""), synchronous)


def assert_loads(config: Path, event: str) -> None:
    from megatron.checkpointing.store.find_checkpoint import find_checkpoint

    found = find_checkpoint(config.with_suffix(""), None, "full")
    assert found is not None, event
    assert found.state.iteration in (SAVE - 2, SAVE), event


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.full)])
def test_killed_at_random_moments(kills: int, dataset: Path, tmp_path: Path) -> None:
    """Each start is killed while a save is being written, or about that time."""
    steps = 10 * kills
    changes = {"train_iters": steps, "checkpoint_factor": 1, "keep_last_n_checkpoints": 2}
    whole, config = (write(tmp_path / name, dataset, **changes) for name in ("whole", "killed"))
    train(whole, "async_save=false", ranks=2)
    ours, theirs = config.with_suffix(""), whole.with_suffix("")
    moments = random.Random(5)
    for _ in range(kills):
        before = newest(ours)
        ranks = start_ranks(config, ranks=2, before=slow)
        while newest(ours) < before + 1 + moments.randrange(4):
            assert all(process.is_alive() for process in ranks.processes), ranks.output()
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 10 * SLOW))
        assert all(process.is_alive() for process in ranks.processes), ranks.output()
        ranks.kill()
    train(config, ranks=2)
    assert_same_run(ours, theirs, steps)


def newest(run: Path) -> int:
    return max((int(path.name.removeprefix("global_step")) for path in run.glob("global_step*")), default=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_cannot_be_written_is_told_on_all_ranks(
    rank: int, dataset: Path, tmp_path: Path, synchronous: Path
) -> None:
    config = write(tmp_path, dataset)
    finished = run_ranks(config, ranks=2, before=slow, arguments=(limit_file_size_in_save, SAVE, rank, 8192))
    assert finished.codes == [1, 1], finished.output
    assert finished.output.count("the checkpoint of step 4 could not be written") == 2
    assert f": rank {rank}: " in finished.output
    run = config.with_suffix("")
    assert sorted(path.name for path in run.glob("*global_step*")) == ["global_step2"]
    train(config, ranks=2)
    assert_same_run(run, synchronous)


def test_a_step_that_is_not_finite_leaves_the_save_before_it(dataset: Path, tmp_path: Path) -> None:
    """Whether the run ends with it or goes back."""
    ended = write(tmp_path / "ended", dataset)
    finished = run_ranks(ended, ranks=2, before=slow, arguments=(not_finite, "loss", [5], 0))
    assert finished.codes == [1, 1], finished.output
    assert sorted(path.name for path in ended.with_suffix("").glob("*global_step*")) == ["global_step2", "global_step4"]
    back = write(tmp_path / "back", dataset, non_finite_policy="rollback")
    output = train(back, ranks=2, before=slow, arguments=(not_finite, "loss", [5], 0))
    assert "global_step4" in output
    assert list(records(back.with_suffix(""), "train/lm_loss")) == [1, 2, 3, 4, 5, 6]
