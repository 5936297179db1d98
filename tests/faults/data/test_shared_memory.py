"""Too little shared memory ends with one line that names the key, and never with a hang."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from tests.helpers.forkserver import ROOT

PROGRAM = """
    import numpy as np
    from megatron.data.micro_batch import micro_batches
    from megatron.errors import exit_on_user_error
    from tests.helpers.squares import Squares

    class Long(Squares):
        def __getitem__(self, item):
            return np.full(20_000, item)

    def main():
        batches = micro_batches(
            Long(50), consumed_samples=0, micro_batch_size=4, data_rank=0, data_size=1, num_workers={workers}
        )
        print([int(next(batches)[0, 0]) for _ in range(9)])
        return 0

    exit_on_user_error(main)
"""

KILL = """
    import multiprocessing, os, signal

    def kill_workers():
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
"""


def small_shared_memory(kibibytes: int, workers: int) -> subprocess.CompletedProcess[str]:
    """Reads nine batches of 625 KiB where /dev/shm has so much room."""
    mount = f"mount -t tmpfs -o size={kibibytes}k tmpfs /dev/shm"
    program = textwrap.dedent(PROGRAM).format(workers=workers)
    # torch advises against more workers than cores, of which these tests may have one.
    python = [sys.executable, "-W", "ignore:This DataLoader will create", "-c", program]
    words = ["unshare", "-rm", "sh", "-c", f'{mount} || exit 77; exec "$@"', "sh", *python]
    try:
        done = subprocess.run(words, cwd=ROOT, timeout=120, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("unshare is not installed: no file system of its own can be mounted")
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    return done


@pytest.mark.parametrize("kibibytes", [16, pytest.param(256, marks=pytest.mark.full)])
def test_too_little_is_told(kibibytes: int) -> None:
    """16 KiB are too few for the queues, 256 KiB for a batch."""
    done = small_shared_memory(kibibytes, workers=2)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("EnvironmentSetupError: /dev/shm has no room")
    assert "`num_workers: 0`" in line


@pytest.mark.full
def test_it_is_not_needed_without_workers() -> None:
    done = small_shared_memory(16, workers=0)
    assert (done.returncode, done.stdout) == (0, "[0, 4, 8, 12, 16, 20, 24, 28, 32]\n"), done.stderr


@pytest.mark.full
def test_a_killed_worker_is_told() -> None:
    """As the kernel kills it for lack of memory."""
    program = textwrap.dedent(PROGRAM).format(workers=1)
    program = program.replace("    print(", "    next(batches)\n    kill_workers()\n    print(")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILL) + program],
        cwd=ROOT,
        timeout=120,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("EnvironmentSetupError: a process that reads data ahead has died (")
