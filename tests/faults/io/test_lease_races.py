"""Processes that want a folder in one moment: one gets it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from unittest import mock

import pytest

from megatron.errors import CheckpointError
from megatron.io.lease import LEASE_FILE, FolderLease
from tests.helpers.forkserver import CONTEXT, ENVIRONMENT, ROOT

CONTENDERS = 6


def _contend(folder: Path, start: Barrier, end: Barrier, results: Connection) -> None:
    claim = FolderLease(folder, "a contender")
    start.wait()
    try:
        results.send("taken" if claim.attempt() else "asked to wait")
    except CheckpointError as error:
        results.send(str(error))
    end.wait()
    claim.release()


def _contended(folder: Path) -> list[str]:
    """What contenders of one moment are told."""
    start, end = CONTEXT.Barrier(CONTENDERS), CONTEXT.Barrier(CONTENDERS)
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(CONTENDERS)]
    with mock.patch.dict(os.environ, ENVIRONMENT):
        processes = [CONTEXT.Process(target=_contend, args=(folder, start, end, send)) for _, send in pipes]
        for process in processes:
            process.start()
    told = [receive.recv() for receive, _ in pipes]
    for process in processes:
        process.join(30)
    return told


@pytest.mark.parametrize("left", [False, True], ids=["a free folder", "a folder that a dead process has left"])
def test_one_of_many_gets_it(left: bool, tmp_path: Path) -> None:
    if left:
        process = CONTEXT.Process(target=_die_as_holder, args=(tmp_path,))
        with mock.patch.dict(os.environ, ENVIRONMENT):
            process.start()
        process.join(30)
        assert (tmp_path / LEASE_FILE).exists()
    told = _contended(tmp_path)
    assert told.count("taken") == 1, told
    assert set(told) <= {"taken", "asked to wait"}
    assert list(tmp_path.iterdir()) == [], "all of it is gone at the end"


def _die_as_holder(folder: Path) -> None:
    FolderLease(folder, "").acquire()
    os._exit(1)


def test_a_holder_that_nobody_has_reaped_is_gone(tmp_path: Path) -> None:
    """As in a container whose first process does not ask for exit codes: the holder stays in the list of processes."""
    program = "import os, sys; from pathlib import Path; from megatron.io.lease import FolderLease\n"
    program += "FolderLease(Path(sys.argv[1]), '').acquire(); os.kill(os.getpid(), 9)"
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT) as holder:
        while Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        claim = FolderLease(tmp_path, "")
        assert claim.attempt(), "at once"
        claim.release()
