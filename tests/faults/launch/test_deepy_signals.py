"""A signal to one rank ends deepy.py as it ends its ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.interrupted import TWO_RANKS, saved
from tests.helpers.records import records
from tests.helpers.runs import ROOT


@pytest.mark.full
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
