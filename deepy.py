"""Starts a script of this project on every rank: `python deepy.py train.py [-d DIR] a.yml b.yml key=value ...`

The configuration is validated first, before torch is imported and before any rank starts. One rank replaces this
process; several are supervised: signals are passed on to all of them, and when one fails the others are ended too. A
run that a signal or a limit has ended, after it was saved, ends with exit code 75 (megatron/errors.py).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from megatron.config.cli import load_command_line
from megatron.errors import STOPPED_ON_REQUEST, ConfigError, exit_on_user_error

TRAINING_SCRIPT = "train.py"
"""Every other script runs a trained model, which has no batch triangle and no pipeline."""
FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_SECONDS = 5.0
POLL_SECONDS = 0.1


def main(argv: Sequence[str]) -> int:
    """Validate, then run the script on the ranks of this machine; returns its exit code."""
    if not argv or not argv[0].endswith(".py"):
        raise ConfigError("usage: python deepy.py SCRIPT.py [-d DIR] CONFIG.yml [CONFIG.yml ...] [key=value ...]")
    script, arguments = Path(argv[0]), argv[1:]
    if not script.is_file():
        raise ConfigError(f"{script}: no such script. deepy.py runs train.py, generate.py or eval.py.")
    command, loaded = load_command_line(arguments)
    if command.answered:
        return 0
    ranks = loaded.run.launch.num_gpus or visible_devices()
    if script.name == TRAINING_SCRIPT:
        loaded.batch(ranks)
    else:
        loaded.replicas(ranks)
    worker = [sys.executable, str(script), *arguments]
    port = loaded.run.launch.master_port or free_port()
    environments = [rank_environment(os.environ, rank, ranks, port) for rank in range(ranks)]
    if ranks == 1:
        sys.stdout.flush()
        os.execve(worker[0], worker, environments[0])  # noqa: S606 - an argv list, no shell
    workers: list[subprocess.Popen[bytes]] = []
    pass_signals_to(workers)
    workers.extend(subprocess.Popen(worker, env=environment) for environment in environments)
    return supervise(workers)


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


if __name__ == "__main__":
    exit_on_user_error(lambda: main(sys.argv[1:]))
