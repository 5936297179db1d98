"""Ranks as tasks of srun or mpirun, which start deepy.py for each; it finds its place in their variables."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from megatron.errors import ConfigError
from megatron.launch.hostfile import Node
from megatron.launch.launcher import END, Job, Processes
from megatron.launch.local import LOOPBACK, local_slots
from megatron.launch.messages import MESSAGES_VARIABLE
from megatron.launch.nodes import draw_port


def tell_tasks(processes: Processes, number: int) -> None:
    """Gives srun or mpirun a signal: they pass USR1 on, and end their tasks on TERM."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM if number == END else signal.SIGUSR1)


def task_variables(job: Job, master_addr: str) -> dict[str, str]:
    """Returns what the environment of mpirun has beside that of deepy.py, for the tasks to inherit."""
    port = job.config.master_port or draw_port()
    return {"MASTER_ADDR": job.config.master_addr or master_addr, "MASTER_PORT": str(port), MESSAGES_VARIABLE: "1"}


def mpi_nodes(job: Job) -> tuple[Node, ...]:
    """Returns the machines for mpirun: those of the hostfile, or this one by its loopback address.

    Raises ConfigError for single GPUs, which mpirun cannot be told.
    """
    nodes = job.nodes or (Node(LOOPBACK, local_slots(job.config)),)
    require_whole_machines(nodes, "mpirun")
    return nodes


def require_whole_machines(nodes: Sequence[Node], program: str) -> None:
    """Raises ConfigError where single GPUs of a machine are chosen, and `program` can only be told how many."""
    for node in nodes:
        if node.slots != tuple(range(len(node.slots))):
            raise ConfigError(
                f"include, exclude: {program} cannot be told which GPUs of {node.host} to take. Choose whole machines, "
                "or use launcher: ssh."
            )


def require_equal_machines(nodes: Sequence[Node], program: str) -> int:
    """Returns the ranks on each machine. Raises ConfigError where they differ, and `program` starts as many on each."""
    counts = {len(node.slots) for node in nodes}
    if len(counts) > 1:
        raise ConfigError(
            f"hostfile: {program} starts as many ranks on each machine, and these have {sorted(counts)} slots. Set "
            f"num_gpus: {min(counts)}, or use launcher: ssh."
        )
    return counts.pop()
