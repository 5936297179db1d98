"""Hangs: the rank that the others wait for is named, and the run ends with an exit code that asks for a new start."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.configs import TOKENFORMER
from tests.helpers.faults import at_step, this_rank
from tests.helpers.records import records
from tests.helpers.runs import run_ranks, start_ranks

WATCHED = TOKENFORMER | {
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 100_000,
    "eval_iters": 0,
    "hang_factor": 3.0,
    "hang_min_seconds": 2.0,
}


def fast_watch() -> None:
    from megatron.training.hangs import watchdog

    watchdog.BEAT_SECONDS, watchdog.ANSWER_SECONDS, watchdog.STORE_SECONDS = 0.2, 2.0, 2.0


def loop_for_ever(step: int, rank: int) -> None:
    def a_loop_without_end() -> None:
        while True:
            pass

    fast_watch()
    if this_rank() == rank:
        at_step(step, a_loop_without_end)


def slow(step: int) -> None:
    """Rank 1 is slow in a step, and rank 0 after one, while rank 1 waits for it in the next."""
    from megatron.training.callbacks.metrics import Metrics

    fast_watch()
    if this_rank() == 1:
        at_step(step, lambda: time.sleep(1.2))
        return
    original = Metrics.after_step

    def after_step(self: Metrics, taken: object) -> None:
        if getattr(taken, "iteration", 0) == step:
            time.sleep(4.0)
        original(self, taken)  # type: ignore[arg-type]

    Metrics.after_step = after_step  # type: ignore[method-assign]


def stuck_in_evaluation(rank: int) -> None:
    from megatron.training.callbacks import evaluation

    fast_watch()
    if this_rank() == rank:
        evaluation.evaluate = lambda context, batches: time.sleep(600)


def report(run: Path) -> str:
    [found] = run.glob("hangs/*/report.txt")
    return found.read_text()


@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.full)])
def test_a_stopped_rank_is_named(write_config: Callable[..., Path], stopped: int) -> None:
    """Rank 0 keeps the store through which ranks talk."""
    config = write_config(WATCHED)
    ranks = start_ranks(config, ranks=2, before=fast_watch)
    ranks.wait_for(" 20/100,000")
    ranks.signal(stopped, signal.SIGSTOP)
    other = ranks.processes[1 - stopped]
    other.join(60)
    output = ranks.output()
    ranks.kill()
    assert other.exitcode == 76, output
    found = report(config.with_suffix(""))
    assert found in output
    assert f"rank {stopped} " in found.splitlines()[1] and " is silent" in found.splitlines()[1]
    assert "in all_reduce, operation" in found.splitlines()[2]
    [stacks] = config.with_suffix("").glob(f"hangs/*/rank{1 - stopped}.txt")
    assert "in train_batch" in stacks.read_text() and "operations begun" in stacks.read_text()


def test_a_rank_that_loops_in_python_is_named(write_config: Callable[..., Path]) -> None:
    config = write_config(WATCHED)
    finished = run_ranks(config, ranks=2, before=loop_for_ever, arguments=(12, 1), timeout=60)
    assert finished.codes == [76, 76], finished.output
    lines = report(config.with_suffix("")).splitlines()
    assert lines[0].startswith("HANG: step 12 has taken ")
    assert lines[1].startswith("  rank 1 (") and "is behind: it has begun" in lines[1]
    assert lines[1].endswith("in a_loop_without_end.")
    assert "Traceback" not in finished.output and "terminate called" not in finished.output
    folder = config.with_suffix("") / "hangs" / "step12"
    assert {"rank0.txt", "rank1.txt", "report.txt"} <= {path.name for path in folder.iterdir()}
    assert "in a_loop_without_end" in (folder / "rank1.txt").read_text()


@pytest.mark.full
def test_slow_steps_and_what_follows_them_are_no_hangs(write_config: Callable[..., Path]) -> None:
    config = write_config(WATCHED, train_iters=16)
    finished = run_ranks(config, ranks=2, before=slow, arguments=(12,), timeout=60)
    assert finished.codes == [0, 0], finished.output
    assert not (config.with_suffix("") / "hangs").exists()


@pytest.mark.full
def test_the_third_hang_at_a_step_asks_for_no_new_start(write_config: Callable[..., Path]) -> None:
    """On one rank, which has nobody to talk to."""
    config = write_config(WATCHED)
    run = config.with_suffix("")
    for earlier in ("step9", "step9.2"):
        (run / "hangs" / earlier).mkdir(parents=True)
    finished = run_ranks(config, before=loop_for_ever, arguments=(9, 0), timeout=60)
    assert finished.codes == [1], finished.output
    assert "It is hang number 3 at this step, so no new start is asked for: exit code 1." in report(run)
    assert "waits for no other rank: it is in step 9, at " in report(run)


@pytest.mark.full
def test_a_collective_that_runs_into_its_limit_outside_of_steps(write_config: Callable[..., Path]) -> None:
    config = write_config(WATCHED, eval_iters=1, eval_interval=3, distributed_timeout_minutes=0.1)
    finished = run_ranks(config, ranks=2, before=stuck_in_evaluation, arguments=(1,), timeout=60)
    assert finished.codes == [76, 76], finished.output
    lines = report(config.with_suffix("")).splitlines()
    assert "a collective in what follows step 3 has taken" in lines[0]
    assert "rank 1 (" in lines[1] and "is behind" in lines[1]


@pytest.mark.full
def test_without_the_watchdog_collectives_have_their_limit(write_config: Callable[..., Path]) -> None:
    config = write_config(WATCHED, hang_factor=0, distributed_timeout_minutes=0.05)
    ranks = start_ranks(config, ranks=2, before=loop_for_ever, arguments=(6, 1))
    ranks.processes[0].join(60)
    output = ranks.output()
    ranks.kill()
    assert ranks.processes[0].exitcode == 1, output
    assert "HANG" not in output and not (config.with_suffix("") / "hangs").exists()


def slow_always(rank: int) -> None:
    """`rank` takes 50 ms longer for each step than the others."""
    from megatron.training import loop

    original = loop.seed_dropout

    def late(*arguments: Any) -> None:
        time.sleep(0.05)
        original(*arguments)

    if this_rank() == rank:
        loop.seed_dropout = late


@pytest.mark.full
def test_the_metrics_name_the_slow_rank(write_config: Callable[..., Path]) -> None:
    config = write_config(WATCHED, train_iters=12, log_interval=4)
    finished = run_ranks(config, ranks=2, before=slow_always, arguments=(1,), timeout=60)
    assert finished.codes == [0, 0], finished.output
    run = config.with_suffix("")
    last = {key: records(run, f"train/{key}")[12] for key in ("slowest_rank", "rank_seconds_min", "rank_seconds_max")}
    assert last["slowest_rank"] == 1
    assert last["rank_seconds_max"] > max(0.05, last["rank_seconds_min"])
