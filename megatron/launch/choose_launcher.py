"""Chooses what starts the ranks, and how many there are: by the keys, the hostfile and the allocation of Slurm."""

from __future__ import annotations

import shutil
import socket
from dataclasses import replace

from megatron.errors import ConfigError, EnvironmentSetupError
from megatron.launch.hostfile import Node, choose_nodes, find_hostfile, read_hostfile
from megatron.launch.launcher import LAUNCHERS, Job, Start
from megatron.launch.launchers.slurm import is_in_allocation
from megatron.launch.local import local_slots

LOCAL = "local"
OVER_HOSTFILE = ("ssh", "pdsh")
"""Launchers that reach the machines of a hostfile; without one, ranks start on this machine."""
_LOOPBACK = {"localhost", "127.0.0.1"}


def choose_launcher(job: Job) -> tuple[str, Start | tuple[int, ...]]:
    """Returns the launcher's name, and what it starts: commands, or ranks on GPUs of this machine, by number.

    Raises ConfigError or EnvironmentSetupError where it cannot start what is asked for.
    """
    config = job.config
    nodes: tuple[Node, ...] = ()
    if config.launcher != LOCAL:
        hostfile = find_hostfile(config, job.environment)
        nodes = () if hostfile is None else choose_nodes(read_hostfile(hostfile), config)
    name = config.launcher
    if name is None:
        name = "ssh" if nodes else "slurm" if is_in_allocation(job.environment) else LOCAL
    launcher = LAUNCHERS[name]
    if launcher.start is None or (name in OVER_HOSTFILE and _are_here(nodes)):
        return LOCAL, _slots_here(job, nodes)
    if shutil.which(launcher.program) is None:
        raise EnvironmentSetupError(
            f"launcher: {name}: the program {launcher.program} is not installed here. Install it, or start train.py "
            "with what this machine has: torchrun, srun or mpirun; `launcher: local` starts ranks here."
        )
    return name, launcher.start(replace(job, nodes=nodes))


def _slots_here(job: Job, nodes: tuple[Node, ...]) -> tuple[int, ...]:
    if nodes:
        return nodes[0].slots
    if (job.config.num_nodes or 1) > 1:
        raise ConfigError(
            f"num_nodes: {job.config.num_nodes} machines are asked for, and nothing names them. Give a hostfile with a "
            "line `NAME slots=RANKS` for each, or start this in an allocation of Slurm."
        )
    return local_slots(job.config)


def _are_here(nodes: tuple[Node, ...]) -> bool:
    """Tells whether ranks are for this machine alone: without a hostfile, or by one that lists nothing else."""
    return not nodes or (len(nodes) == 1 and nodes[0].host in {*_LOOPBACK, socket.gethostname(), socket.getfqdn()})
