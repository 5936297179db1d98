"""ssh to each machine of the hostfile, with a pipe on which that machine is told what to do."""

from __future__ import annotations

import contextlib

from megatron.launch.launcher import LAUNCHERS, Command, Job, Launcher, Processes, Start
from megatron.launch.nodes import NodeJob, node_command

OPTIONS = (
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=20"),
    # A machine that is gone is noticed after a minute.
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"),
)


def start_by_ssh(job: Job) -> Start:
    """Prepares one ssh for each machine."""
    description = NodeJob.of(job, by_socket=False)
    # What the user says comes first: ssh takes the first value of an option.
    ssh = ("ssh", *job.config.launcher_args, *OPTIONS)
    commands = [
        Command((*ssh, node.host, node_command(description, str(number), job.deepy)), host=node.host, keep_stdin=True)
        for number, node in enumerate(job.nodes)
    ]
    checks = [Command((*ssh, node.host, "true"), host=node.host) for node in job.nodes]
    return Start(
        description.world_size,
        tuple(commands),
        tell_by_stdin,
        tuple(checks),
        tuple(description.hosts),
        description.explanation(),
    )


def tell_by_stdin(processes: Processes, number: int) -> None:
    """Writes a signal's number to every machine."""
    for process in processes:
        if process.stdin is not None:
            with contextlib.suppress(OSError):  # it has just ended
                process.stdin.write(f"{number}\n".encode())
                process.stdin.flush()


LAUNCHERS.register("ssh")(Launcher(start=start_by_ssh, program="ssh"))
