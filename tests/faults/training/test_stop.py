"""Signals: all ranks save at the next step boundary, and what follows is the uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.faults import hang_at_step, signal_at_step, signal_in_evaluation
from tests.helpers.interrupted import TWO_RANKS, saved
from tests.helpers.records import records
from tests.helpers.runs import run_ranks, start_ranks, train
from tests.helpers.tensor_files import assert_same_checkpoint


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run of TWO_RANKS."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = folder / "run.yml"
    paths = {"data_path": str(dataset), "save": str(folder / "run"), "index_cache_dir": str(folder)}
    config.write_text(json.dumps(TWO_RANKS | paths))
    train(config, ranks=2)
    return folder / "run"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_rank_saves_all(
    number: signal.Signals, write_config: Callable[..., Path], uninterrupted: Path
) -> None:
    config = write_config(TWO_RANKS)
    run = config.with_suffix("")
    stopped = run_ranks(config, ranks=2, before=signal_at_step, arguments=(7, 1, [number]))
    assert stopped.codes == [75, 75], stopped.output
    assert f"[rank 1] WARNING {number.name}: the run will be saved after this step" in stopped.output
    assert saved(run) == ["global_step7"]
    assert run_ranks(config, ranks=2).codes == [0, 0]
    assert_same_checkpoint(run / "global_step12", uninterrupted / "global_step12")
    for key in ("train/lm_loss", "valid/lm_loss", "test/lm_loss"):
        assert records(run, key) == records(uninterrupted, key)


def test_a_signal_to_all_processes_of_a_run(write_config: Callable[..., Path]) -> None:
    """Loader workers get it as well, as from Slurm or Ctrl-C: none of them may die before the save."""
    config = write_config(TWO_RANKS, num_workers=2, train_iters=10_000, eval_interval=2)
    ranks = start_ranks(config, ranks=2)
    ranks.wait_for(" 5/10,000")
    os.killpg(ranks.processes[0].pid or 0, signal.SIGTERM)
    stopped = ranks.wait()
    assert stopped.codes == [75, 75], stopped.output
    assert "again: aborting" not in stopped.output
    [checkpoint] = saved(config.with_suffix(""))
    assert int(checkpoint.removeprefix("global_step")) == len(records(config.with_suffix(""), "train/lm_loss")) >= 5


def test_a_signal_during_evaluation(write_config: Callable[..., Path], uninterrupted: Path) -> None:
    config = write_config(TWO_RANKS)
    run = config.with_suffix("")
    stopped = run_ranks(config, ranks=2, before=signal_in_evaluation, arguments=(5, 1, signal.SIGTERM))
    assert stopped.codes == [75, 75], stopped.output
    assert saved(run) == ["global_step8"]
    assert run_ranks(config, ranks=2).codes == [0, 0]
    assert_same_checkpoint(run / "global_step12", uninterrupted / "global_step12")
    expected = records(uninterrupted, "valid/lm_loss")
    assert records(run, "valid/lm_loss") == {step: expected[step] for step in (4, 12)}, "step 8 was cut short"


def test_the_same_signal_passed_on_twice_is_one_request(write_config: Callable[..., Path]) -> None:
    config = write_config(TWO_RANKS)
    twice = [signal.SIGTERM, signal.SIGTERM]
    stopped = run_ranks(config, ranks=2, before=signal_at_step, arguments=(3, 0, twice))
    assert stopped.codes == [75, 75], stopped.output


def test_a_second_signal_aborts_a_rank_that_waits_for_another(write_config: Callable[..., Path]) -> None:
    config = write_config(TWO_RANKS)
    ranks = start_ranks(config, ranks=2, before=hang_at_step, arguments=(3, 1))
    ranks.wait_for("step  2/12")
    ranks.signal(0, signal.SIGTERM)
    ranks.wait_for("[rank 0] WARNING SIGTERM")
    time.sleep(0.7)
    assert ranks.processes[0].is_alive()
    ranks.signal(0, signal.SIGTERM)
    ranks.processes[0].join(10)
    assert ranks.processes[0].exitcode == 128 + signal.SIGTERM
    assert "SIGTERM again: aborting" in ranks.output()
    ranks.kill()
