"""deepy.py refuses what it cannot start, and several ranks are supervised."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron.launch.local import rank_environment, supervise
from tests.integration.conftest import ROOT, run_command

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
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import pathlib, test_launch
from megatron.launch.local import forward_signals, supervise
workers = []
forward_signals(workers)
workers.extend(test_launch.start(pathlib.Path({str(tmp_path)!r}), "none"))
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


def test_threads_are_shared_out_unless_the_user_decides() -> None:
    assert rank_environment({"OMP_NUM_THREADS": "3"}, 0, 2, 1)["OMP_NUM_THREADS"] == "3"
    assert int(rank_environment({}, 0, 1000, 1)["OMP_NUM_THREADS"]) == 1


def test_usage_and_missing_scripts() -> None:
    finished = run_command(["deepy.py"])
    assert finished.returncode == 2 and "usage: python deepy.py SCRIPT.py" in finished.stderr
    finished = run_command(["deepy.py", "trian.py", "configs/demo.yml"])
    assert finished.returncode == 2 and "trian.py: no such script" in finished.stderr
