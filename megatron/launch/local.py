"""Starts ranks on this machine and watches them: signals go to all of them, and one that fails ends the others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from megatron.errors import STOPPED_ON_REQUEST

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_SECONDS = 5.0
POLL_SECONDS = 0.1


def visible_devices() -> int:
    """GPUs that this machine offers, or 1 for a CPU."""
    import torch

    return max(torch.cuda.device_count(), 1)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(base: Mapping[str, str], rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment of one rank on this machine. Threads are shared out unless the user has decided.

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
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def pass_signals_to(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Send every signal that this process gets to whatever is in `workers` then."""

    def forward(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    for number in FORWARDED_SIGNALS:
        signal.signal(number, forward)


def supervise(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all ranks; returns 0, or STOPPED_ON_REQUEST where ranks have ended with that.

    The first rank that fails ends the others, and its exit code is returned.
    """
    while True:
        codes = [worker.poll() for worker in workers]
        failed = next((code for code in codes if code not in {None, 0, STOPPED_ON_REQUEST}), None)
        if failed is not None:
            rank = codes.index(failed)
            print(f"deepy.py: rank {rank} ended with exit code {failed}; ending the other ranks", file=sys.stderr)
            end(workers)
            return failed if failed > 0 else 128 - failed
        if None not in codes:
            return max(code for code in codes if code is not None)
        time.sleep(POLL_SECONDS)


def end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask the ranks that still run to stop, and kill those that do not within the grace period: without one of them,
    they could not save anyway."""
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
