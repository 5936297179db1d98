"""Starts ranks on this machine and supervises them: signals go to all of them, and one that fails ends the others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from megatron.errors import INTERRUPTED, STOPPED_ON_REQUEST, ConfigError

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_SECONDS = 5.0
POLL_SECONDS = 0.1
LOOPBACK = "127.0.0.1"
LISTENER_VARIABLE = "MASTER_LISTEN_FD"
"""Tells rank 0 the file descriptor of the socket on which the ranks meet; megatron/mpu/process_group.py takes it."""


def visible_devices() -> int:
    """Counts the GPUs that this machine offers; 1 for a CPU. Imports torch."""
    import torch

    return max(torch.cuda.device_count(), 1)


def run_ranks(command: list[str], ranks: int, port: int | None) -> int:
    """Runs `command` on `ranks` ranks of this machine, which meet on `port`, or on a free one; returns the exit code.

    One rank meets nobody: it replaces this process, which does not return. Several are supervised. Raises ConfigError
    when the port is taken.
    """
    if ranks == 1:
        sys.stdout.flush()
        os.execve(command[0], command, rank_environment(os.environ, 0, 1, 0))  # noqa: S606 - an argv list, no shell
    workers: list[subprocess.Popen[bytes]] = []
    with hold_port(port) as listener:
        held, environments = (
            listener.fileno(),
            [rank_environment(os.environ, rank, ranks, listener.getsockname()[1]) for rank in range(ranks)],
        )
        environments[0][LISTENER_VARIABLE] = str(held)
        # Before the first rank starts, so that no signal is lost between two of them.
        forward_signals(workers)
        for rank, environment in enumerate(environments):
            workers.append(subprocess.Popen(command, env=environment, pass_fds=[held] if rank == 0 else []))
    return supervise(workers)


def hold_port(port: int | None) -> socket.socket:
    """Returns a socket that listens on `port`, or on a free one, for ranks of this machine alone.

    Rank 0 inherits it: a port that were only chosen here could be anybody's by the time that the ranks meet. Raises
    ConfigError when the port cannot be had.
    """
    try:
        return socket.create_server((LOOPBACK, port or 0))
    except OSError as error:
        raise ConfigError(
            f"master_port: the ranks cannot meet on port {port} of this machine: {error.strerror}. Name another port, "
            "or leave the key out, and a free one is taken."
        ) from error


def rank_environment(base: Mapping[str, str], rank: int, ranks: int, port: int) -> dict[str, str]:
    """Builds the environment of one rank on this machine. Threads are shared out unless the user has decided.

    They sleep while they wait: threads that spin instead slow a run down tenfold where other programs share the cores.
    """
    threads = max((os.cpu_count() or 1) // ranks, 1)
    return {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        **base,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
    }


def forward_signals(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Sends every signal that this process gets from now on to whatever is in `workers` then."""

    def forward(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    for number in FORWARDED_SIGNALS:
        signal.signal(number, forward)


def supervise(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits for all ranks; returns 0, or STOPPED_ON_REQUEST where ranks have ended with that.

    The first rank that fails ends the others, and its exit code is returned.
    """
    while True:
        codes = [worker.poll() for worker in workers]
        failed = next((code for code in codes if code not in {None, 0, STOPPED_ON_REQUEST}), None)
        if failed is not None:
            rank = codes.index(failed)
            if failed != INTERRUPTED:  # which rank 0 has said
                print(f"deepy.py: rank {rank} ended with exit code {failed}; ending the other ranks", file=sys.stderr)
            end_workers(workers)
            return failed if failed > 0 else 128 - failed
        if None not in codes:
            return max(code for code in codes if code is not None)
        time.sleep(POLL_SECONDS)


def end_workers(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Terminates the ranks that still run, and kills those that do not end within the grace period.

    Without one of them, the others could not save anyway.
    """
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for worker in workers:
        try:
            worker.wait(timeout=max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
