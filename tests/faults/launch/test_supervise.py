"""Several ranks are supervised: one that fails ends the others, and signals reach all of them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron.launch.local import rank_environment, supervise
from tests.helpers.forkserver import ROOT

WORKER = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def note(number, frame):
    (folder / f"signal{number}.rank{os.environ['RANK']}").touch()
    sys.exit(0)
signal.signal(signal.SIGUSR1, note)
signal.signal(signal.SIGTERM, note)
(folder / f"ready.rank{os.environ['RANK']}").touch()
if os.environ["RANK"] == sys.argv[2]:
    sys.exit(7)
time.sleep(60)
"""


def start(folder: Path, failing_rank: str) -> list[subprocess.Popen[bytes]]:
    worker = [sys.executable, "-c", WORKER, str(folder), failing_rank]
    workers = [subprocess.Popen(worker, env=rank_environment({}, rank, 2, 29500)) for rank in range(2)]
    deadline = time.monotonic() + 30
    while len(list(folder.glob("ready.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    return workers


def test_a_failing_rank_ends_the_others_and_gives_its_exit_code(tmp_path: Path) -> None:
    workers = start(tmp_path, failing_rank="1")
    assert supervise(workers) == 7
    assert workers[0].poll() is not None
    assert (tmp_path / f"signal{signal.SIGTERM}.rank0").exists()


def test_signals_reach_every_rank(tmp_path: Path) -> None:
    script = f"""
import pathlib, sys
from megatron.launch.local import forward_signals, supervise
from tests.faults.launch.test_supervise import start
workers = []
forward_signals(workers)
workers.extend(start(pathlib.Path({str(tmp_path)!r}), "none"))
sys.exit(supervise(workers))
"""
    supervisor = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    supervisor.send_signal(signal.SIGUSR1)
    assert supervisor.wait(timeout=30) == 0
    assert len(list(tmp_path.glob(f"signal{signal.SIGUSR1}.rank*"))) == 2
