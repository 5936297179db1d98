"""Saves that are written while training goes on are as safe as synchronous ones."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.async_saves import SLOW, assert_same_run, slow, write
from tests.helpers.faults import limit_file_size_in_save, not_finite, watch_save
from tests.helpers.interrupted import KILLED, SAVE
from tests.helpers.records import records
from tests.helpers.runs import run_ranks, start_ranks, train


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
@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.full)])
def test_killed_at_random_moments(
    kills: int, saved_each_step: Callable[[int], tuple[Path, float]], dataset: Path, tmp_path: Path
) -> None:
    """Each start is killed while a save is being written, or about that time."""
    steps = 10 * kills
    theirs, _ = saved_each_step(steps)
    config = write(tmp_path, dataset, train_iters=steps, checkpoint_factor=1, keep_last_n_checkpoints=2)
    ours = config.with_suffix("")
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
