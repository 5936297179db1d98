"""Ranks on this machine: all of a run, or the one that srun or mpirun has started here."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

from megatron.config.sections.launch import LaunchConfig
from megatron.errors import ConfigError
from megatron.launch.failures import print_failures
from megatron.launch.hostfile import Node, choose_nodes
from megatron.launch.launcher import Place
from megatron.launch.messages import MESSAGES_VARIABLE, send
from megatron.launch.orphans import no_orphans
from megatron.launch.rank_environment import rank_environment
from megatron.launch.supervise import Supervisor, forward_signals
from megatron.rank_channel import end_with_parent

LOOPBACK = "127.0.0.1"


def visible_devices() -> int:
    """Counts the GPUs that this machine offers; 1 for a CPU. Imports torch."""
    import torch

    return max(torch.cuda.device_count(), 1)


def local_slots(config: LaunchConfig) -> tuple[int, ...]:
    """Chooses the GPUs of this machine, or ranks on its CPU, that a run takes, by number.

    Raises ConfigError where include or exclude name what is not there.
    """
    if config.include is None and config.exclude is None:
        return tuple(range(config.num_gpus or visible_devices()))
    here = Node("localhost", tuple(range(visible_devices())))
    return choose_nodes((here,), config)[0].slots


def show_local(command: Sequence[str], slots: Sequence[int], config: LaunchConfig) -> str:
    """Returns the lines that a shell would need for what `run_ranks` starts."""
    lines = []
    for rank in range(len(slots)):
        place = Place(rank, len(slots), rank)
        own = rank_environment({}, place, (LOOPBACK, config.master_port or 0), slots)
        if len(slots) > 1 and config.master_port is None:
            own["MASTER_PORT"] = "FREE_PORT"
        lines.append(shlex.join([*(f"{name}={value}" for name, value in own.items()), *command]))
    return "\n".join(lines)


def run_ranks(command: list[str], slots: Sequence[int], config: LaunchConfig) -> int:
    """Runs `command` on ranks of this machine, which meet on a port of loopback; returns the exit code.

    One rank meets nobody: it replaces this process, which does not return. Several are supervised. Raises ConfigError
    when the port is taken.
    """
    ranks = len(slots)
    if ranks == 1:
        sys.stdout.flush()
        environment = rank_environment(os.environ, Place(0, 1, 0), (LOOPBACK, 0), slots)
        os.execve(command[0], command, environment)  # noqa: S606 - an argv list, no shell
    with no_orphans():
        supervisor = Supervisor(config.termination_grace_seconds)
        with hold_port(config.master_port) as listener:
            meeting_point = (LOOPBACK, listener.getsockname()[1])
            # Before the first rank starts, so that no signal is lost between two of them.
            forward_signals(supervisor.signal)
            for rank in range(ranks):
                environment = rank_environment(os.environ, Place(rank, ranks, rank), meeting_point, slots)
                supervisor.start(command, rank, environment, listener.fileno() if rank == 0 else None)
        outcome = supervisor.wait()
    print_failures(outcome)
    return outcome.code


def run_task(command: list[str], environment: Mapping[str, str], config: LaunchConfig, *, is_child: bool) -> int:
    """Runs the one rank that srun or mpirun has started here, in an environment that has its place; returns its code.

    Where deepy.py has started those, it is told what happens, and the code is 0. Where this process is their child, the
    rank ends with them.
    """
    supervisor = Supervisor(config.termination_grace_seconds)
    forward_signals(supervisor.signal)
    signal.signal(signal.SIGHUP, lambda number, frame: supervisor.end())
    if is_child:
        end_with_parent(os.getppid(), signal.SIGHUP)
    with no_orphans():
        # Its output goes through pipes, in which Python would hold it back.
        supervisor.start(command, int(environment["RANK"]), {"PYTHONUNBUFFERED": "1", **environment})
        outcome = supervisor.wait()
    if MESSAGES_VARIABLE in environment:
        send("outcome", outcome.to_json())
        return 0
    print_failures(outcome)
    return outcome.code


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
