"""Runs of train.py and generate.py as users start them, in forks of a process that has imported everything."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from tests.helpers.forkserver import CONTEXT, ENVIRONMENT, ROOT


@dataclass(frozen=True)
class Finished:
    """How a run has ended."""

    codes: list[int]
    """Exit codes by rank; -N for signal N."""
    output: str
    """What all ranks printed."""

    @property
    def code(self) -> int:
        """The exit code that all ranks have in common."""
        assert len(set(self.codes)) == 1, (self.codes, self.output)
        return self.codes[0]


class RunningRanks:
    """The processes of a run; they form one process group, with their loader workers."""

    def __init__(self, processes: list[ForkServerProcess], outputs: list[Path]) -> None:
        self.processes = processes
        self.outputs = outputs

    def output(self) -> str:
        return "".join(path.read_text(errors="replace") for path in self.outputs if path.exists())

    def wait_for(self, text: str, timeout: float = 120.0) -> None:
        """Wait until a rank has printed `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.output():
            assert time.monotonic() < deadline and any(p.is_alive() for p in self.processes), self.output()
            time.sleep(0.01)

    def signal(self, rank: int, number: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def kill(self) -> None:
        """SIGKILL to all ranks and their loader workers."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.processes[0].pid or 0, signal.SIGKILL)
            process.join(30)

    def wait(self, timeout: float = 240.0) -> Finished:
        """As under deepy.py, a rank that dies takes the others with it. Fails when a rank is late."""
        deadline = time.monotonic() + timeout
        while any(process.is_alive() for process in self.processes):
            if any(process.exitcode is not None and process.exitcode < 0 for process in self.processes):
                self.kill()
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"not done after {timeout:g} s:\n{self.output()}")
            time.sleep(0.01)
        for process in self.processes:
            process.join()
        # Kept, they would keep a file descriptor each.
        if self in _started:
            _started.remove(self)
        return Finished([process.exitcode or 0 for process in self.processes], self.output())


def start_ranks(
    config: Path,
    *overrides: str,
    ranks: int = 1,
    script: str = "train",
    output: Path | None = None,
    before: Callable[..., None] | None = None,
    arguments: Any = (),
) -> RunningRanks:
    """`SCRIPT.py CONFIG OVERRIDES` on `ranks` ranks, whose output goes to the folder `output`, or that of CONFIG.

    `before(*arguments)` is called on each rank first; it is a module-level function of a test module.
    """
    folder = output or config.parent
    with mock.patch.dict(os.environ, ENVIRONMENT):
        processes: list[ForkServerProcess] = []
        outputs = []
        # Held from here on, as under deepy.py: by the time that a rank listens, a free port may be another test's.
        listener = socket.create_server(("127.0.0.1", 0)) if ranks > 1 else None
        port, number = listener.getsockname()[1] if listener else 0, len(list(folder.glob("output*.rank0")))
        for rank in range(ranks):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            outputs.append(folder / f"output{number}.rank{rank}")
            leader = processes[0].pid if processes else 0
            argv = [str(config), *overrides]
            process = CONTEXT.Process(
                target=_rank,
                args=(environment, listener, outputs[-1], leader, script, argv, before, arguments),
            )
            process.start()
            processes.append(process)
            if listener is not None:
                listener.close()
                listener = None
    running = RunningRanks(processes, outputs)
    _started.append(running)
    return running


def run_ranks(config: Path, *overrides: str, timeout: float = 240.0, **more: Any) -> Finished:
    """`start_ranks`, and wait for the end, at most `timeout` seconds."""
    return start_ranks(config, *overrides, **more).wait(timeout)


def train(config: Path, *overrides: str, **more: Any) -> str:
    """A run that must succeed; returns what it printed."""
    finished = run_ranks(config, *overrides, **more)
    assert finished.code == 0, finished.output
    return finished.output


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
    yield
    sys.stdout.flush()
    sys.stderr.flush()


def _rank(
    environment: dict[str, str],
    listener: socket.socket | None,
    output: Path,
    leader: int,
    script: str,
    argv: list[str],
    before: Callable[..., None] | None,
    arguments: Any,
) -> None:
    while True:
        # The first rank leads the group; another may come before it has made one.
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(0, leader)
            break
    # Loader workers start as they do in any other process.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(environment)
    if listener is not None:
        os.environ["MASTER_LISTEN_FD"] = str(listener.detach())
    os.chdir(ROOT)
    with _output_to(output):
        from megatron.errors import exit_on_user_error

        main = importlib.import_module(script).main
        if before is not None:
            before(*arguments)
        exit_on_user_error(lambda: main(argv))


_started: list[RunningRanks] = []


@atexit.register
def _kill_all() -> None:
    for running in _started:
        if any(process.is_alive() for process in running.processes):
            running.kill()


def fails_with(config: Path, *overrides: str) -> str:
    finished = run_ranks(config, *overrides)
    assert finished.code == 1, finished.output
    assert "Traceback" not in finished.output
    return finished.output
