"""OpenMPI's mpirun, of which only the start of processes is used."""

from __future__ import annotations

import zlib

from megatron.launch.exported import exported
from megatron.launch.launcher import LAUNCHERS, Command, Environment, Job, Launcher, LauncherVariables, Start
from megatron.launch.local import LOOPBACK
from megatron.launch.nodes import PORTS
from megatron.launch.tasks import mpi_nodes, task_variables, tell_tasks

VARIABLES = LauncherVariables("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")


def openmpi_meeting_point(environment: Environment) -> tuple[str, int] | None:
    """Returns loopback, and a port by the name of the job, for ranks of one machine."""
    local_size, name = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE"), environment.get("PMIX_NAMESPACE")
    if name is None or local_size != environment["OMPI_COMM_WORLD_SIZE"]:
        return None
    return LOOPBACK, PORTS[zlib.crc32(name.encode()) % len(PORTS)]


def start_by_openmpi(job: Job) -> Start:
    """Prepares mpirun. Variables are named, and their values stay out of its arguments."""
    nodes = mpi_nodes(job)
    world_size = sum(len(node.slots) for node in nodes)
    variables = task_variables(job, nodes[0].host)
    names = [word for name in (*exported(job.environment), *variables) for word in ("-x", name)]
    hosts = ["--host", ",".join(f"{node.host}:{len(node.slots)}" for node in nodes)] if job.nodes else []
    # Threads of a rank may use all cores, as those of ranks that deepy.py starts.
    options = ["--bind-to", "none", "--wdir", job.folder, *hosts, *names, *job.config.launcher_args]
    argv = ("mpirun", "-n", str(world_size), *options, *job.task_command)
    return Start(world_size, (Command(argv, variables),), tell_tasks)


LAUNCHERS.register("openmpi")(Launcher(VARIABLES, openmpi_meeting_point, start_by_openmpi, "mpirun"))
