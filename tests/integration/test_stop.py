"""Signals and limits: all ranks save at the next step boundary, and what follows is the uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.configs import TOKENFORMER
from tests.helpers.faults import hang_at_step, signal_at_step, signal_in_evaluation
from tests.helpers.runs import ROOT, run_ranks, start_ranks, train
from tests.helpers.tensor_files import assert_same_checkpoint
from tests.integration.conftest import records

TWO_RANKS: dict[str, Any] = TOKENFORMER | {
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 12,
    "eval_interval": 4,
    "eval_iters": 3,
    "auto_resume": True,
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run of TWO_RANKS."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = folder / "run.yml"
    paths = {"data_path": str(dataset), "save": str(folder / "run"), "index_cache_dir": str(folder)}
    config.write_text(json.dumps(TWO_RANKS | paths))
    train(config, ranks=2)
    return folder / "run"


def saved(run: Path) -> list[str]:
    assert not list(run.glob(".*")), "nothing half-written is left"
    return sorted(path.name for path in run.glob("global_step*"))


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


def test_a_limit_of_time(write_config: Callable[..., Path]) -> None:
    """Each start makes some progress, however short the time is."""
    config = write_config(TWO_RANKS, train_iters=3, exit_duration_in_mins=1e-9, eval_iters=0)
    for step, code in ((1, 75), (2, 75), (3, 0)):
        assert run_ranks(config, ranks=2).codes == [code] * 2
        assert saved(config.with_suffix(""))[-1] == f"global_step{step}"
    assert list(records(config.with_suffix(""), "train/lm_loss")) == [1, 2, 3]


def test_an_interval(write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER, train_iters=5, exit_interval=2, eval_iters=0, auto_resume=True)
    runs = [run_ranks(config) for _ in range(4)]
    assert [run.code for run in runs] == [75, 75, 0, 0]
    folder = config.with_suffix("")
    assert saved(folder) == ["global_step2", "global_step4", "global_step5"]
    starts = ["starting from initial weights"]
    starts += [f"going on from {folder / f'global_step{step}'}, {step} steps done" for step in (2, 4, 5)]
    assert all(start in run.output for start, run in zip(starts, runs, strict=True))
    assert "stopped on request, and saved: start again to go on (exit code 75)" in runs[0].output
    assert "stopped" not in runs[2].output


def test_without_a_folder_to_save_in_there_is_nothing_to_go_on_from(write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER, save=None, exit_interval=2)
    finished = run_ranks(config, f"log_dir={config.parent / 'log'}")
    assert finished.code == 1
    assert "stopped on request; nothing is saved, for `save` is not set" in finished.output


def test_deepy_ends_as_its_ranks_do(write_config: Callable[..., Path]) -> None:
    """One rank alone gets the signal; the command as users type it."""
    config = write_config(TWO_RANKS, num_gpus=2, train_iters=10_000, eval_iters=0, num_workers=1)
    run = config.with_suffix("")
    command = [sys.executable, "deepy.py", "train.py", str(config)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as deepy:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(records(run, "train/lm_loss")) < 3:
            assert deepy.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        children = Path(f"/proc/{deepy.pid}/task/{deepy.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGTERM)
        assert deepy.wait(timeout=120) == 75
    [checkpoint] = saved(run)
    assert int(checkpoint.removeprefix("global_step")) == len(records(run, "train/lm_loss")) >= 3
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
