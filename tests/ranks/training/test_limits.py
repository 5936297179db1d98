"""Limits of time and steps: a run saves when it reaches one, and goes on from there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.helpers.configs import TOKENFORMER
from tests.helpers.interrupted import TWO_RANKS, saved
from tests.helpers.records import records
from tests.helpers.runs import run_ranks


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
    starts += [f"going on from {folder / f'global_step{step}'}, {step} steps done" for step in (2, 4)]
    starts += ["nothing to do, 5 of 5 steps are done; a higher train_iters goes on"]
    assert all(start in run.output for start, run in zip(starts, runs, strict=True))
    assert "stopped on request, and saved: start again to go on (exit code 75)" in runs[0].output
    assert "stopped" not in runs[2].output


def test_without_a_folder_to_save_in_there_is_nothing_to_go_on_from(write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER, save=None, exit_interval=2)
    finished = run_ranks(config, f"log_dir={config.parent / 'log'}")
    assert finished.code == 1
    assert "stopped on request; nothing is saved, for `save` is not set" in finished.output
