"""Hydra, the process manager of MPICH, Intel MPI and MVAPICH: its options, and the variables that it sets."""

from __future__ import annotations

from megatron.launch.exported import exported
from megatron.launch.launcher import Command, Job, LauncherVariables, Start
from megatron.launch.tasks import mpi_nodes, require_equal_machines, task_variables, tell_tasks

HYDRA_VARIABLES = LauncherVariables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
_OWN = ("HOME", "USER", "LOGNAME", "SHELL")


def start_by_hydra(program: str, job: Job) -> Start:
    """Prepares `program` to start the ranks. Variables are named, and their values stay out of its arguments."""
    nodes = mpi_nodes(job)
    each = require_equal_machines(nodes, program)
    variables = task_variables(job, nodes[0].host)
    own = (name for name in _OWN if name in job.environment)
    names = ",".join([*exported(job.environment), *own, *variables])
    hosts = ["-hosts", ",".join(node.host for node in nodes)] if job.nodes else []
    counts = ["-n", str(each * len(nodes)), "-ppn", str(each), *hosts]
    options = ["-wdir", job.folder, "-genvlist", names, *job.config.launcher_args]
    argv = (program, *counts, *options, *job.task_command)
    return Start(each * len(nodes), (Command(argv, variables),), tell_tasks)
