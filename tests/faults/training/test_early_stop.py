"""Signals before the first step: nothing is to be saved, so all ranks end at once with 75."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.faults import this_rank
from tests.helpers.interrupted import TWO_RANKS, saved
from tests.helpers.runs import ROOT, RunningRanks, start_ranks

SECONDS = 8.0
"""Time that the end may take on a busy machine; the work before the first step would take a minute."""


def busy_in(phase: str) -> None:
    """Rank 0 works on `phase` for a minute, in Python or in a call that no signal interrupts, and the others wait."""
    from megatron.data.order import index_cache
    from megatron.training import pretrain

    module, name = {
        "tokenizer": (pretrain, "build_tokenizer"),
        "index": (index_cache, "build_sample_index"),
        "engine": (pretrain, "build_engine"),
    }[phase]
    original = getattr(module, name)

    def build(*arguments: Any, **options: Any) -> Any:
        if this_rank() == 0:
            print("busy", flush=True)
            if phase == "index":
                hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)
            time.sleep(60)
        return original(*arguments, **options)

    setattr(module, name, build)


def assert_ends_at_once(ranks: RunningRanks, run: Path, number: signal.Signals) -> None:
    begin = time.monotonic()
    finished = ranks.wait(60)
    assert set(finished.codes) == {75}, finished.output
    assert time.monotonic() - begin < SECONDS
    assert f"{number.name} before the first step: nothing is to be saved yet, the run ends" in finished.output
    assert "Traceback" not in finished.output and "Error" not in finished.output
    assert saved(run) == [], "not even the lease is left"


@pytest.mark.parametrize(
    ("phase", "number", "told"),
    [
        ("index", signal.SIGTERM, (0, 1)),
        ("tokenizer", signal.SIGUSR1, (1,)),
        pytest.param("engine", signal.SIGTERM, (0,), marks=pytest.mark.full),
        pytest.param("engine", signal.SIGINT, (1,), marks=pytest.mark.full),
        pytest.param("tokenizer", signal.SIGTERM, (0, 1), marks=pytest.mark.full),
        pytest.param("index", signal.SIGTERM, (1,), marks=pytest.mark.full),
    ],
)
def test_a_signal_before_the_first_step_ends_all_ranks(
    phase: str, number: signal.Signals, told: tuple[int, ...], write_config: Callable[..., Path]
) -> None:
    config = write_config(TWO_RANKS)
    ranks = start_ranks(config, ranks=2, before=busy_in, arguments=(phase,))
    ranks.wait_for("busy")
    for rank in told:
        ranks.signal(rank, number)
    assert_ends_at_once(ranks, config.with_suffix(""), number)


@pytest.mark.full
def test_a_signal_while_a_lost_nodes_lease_is_watched(write_config: Callable[..., Path]) -> None:
    from tests.faults.training.test_run_lease import OF_ANOTHER_MACHINE, leave_lease

    config = write_config(TWO_RANKS)
    file = leave_lease(config.with_suffix(""), stale=600, **OF_ANOTHER_MACHINE)
    ranks = start_ranks(config, ranks=2)
    ranks.wait_for("waiting 600 s for a sign of life")
    ranks.signal(0, signal.SIGTERM)
    finished = ranks.wait(60)
    assert finished.codes == [75, 75] and "Traceback" not in finished.output, finished.output
    assert file.exists(), "it is not this run's to remove"


@pytest.mark.parametrize(
    ("ranks", "number", "code"),
    [
        (2, signal.SIGINT, 130),
        pytest.param(1, signal.SIGTERM, 75, marks=pytest.mark.full),
        pytest.param(1, signal.SIGINT, 130, marks=pytest.mark.full),
        pytest.param(2, signal.SIGTERM, 75, marks=pytest.mark.full),
    ],
)
def test_a_signal_during_imports(
    ranks: int, number: signal.Signals, code: int, write_config: Callable[..., Path]
) -> None:
    """The command as users type it, told as a terminal or Slurm tells all processes, while it imports torch."""
    config = write_config(TWO_RANKS, num_gpus=ranks)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "deepy.py", "train.py", str(config)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as deepy:
        wait_for_library("libtorch_cpu", deepy.pid)
        os.killpg(deepy.pid, number)
        _, said = deepy.communicate(timeout=60)
    assert deepy.returncode == code, said
    assert "Traceback" not in said
    assert said.count("\n") == 1, said


def wait_for_library(name: str, pid: int) -> None:
    """Waits until the process, or its first child, has begun to load a library."""
    deadline = time.monotonic() + 120
    while True:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if any(name in Path(f"/proc/{process}/maps").read_text() for process in (children or [pid])):
            return
        assert time.monotonic() < deadline
        time.sleep(0.01)
