"""pdsh to all machines of the hostfile at once, by ssh.

It hands nothing on to them, and whatever signal it gets, it never ends what runs there. So a signal is another pdsh,
which finds the process on each machine by the name of the start; and when pdsh ends, the standard input of those
processes does.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from functools import partial

from megatron.launch.launcher import LAUNCHERS, Command, Job, Launcher, Processes, Start
from megatron.launch.nodes import TELL_FLAG, NodeJob, node_command

VARIABLES = {"PDSH_RCMD_TYPE": "ssh"}
NODE = "%n"
"""Mark that pdsh replaces by the number of a machine, from 0. Other percent signs are doubled for it."""


def start_by_pdsh(job: Job) -> Start:
    """Prepares one pdsh for all machines."""
    description = NodeJob.of(job, by_socket=True)
    hosts = ",".join(description.hosts)
    pdsh = ("pdsh", "-S", "-N", "-f", str(len(job.nodes)), "-w", hosts, *job.config.launcher_args)
    deepy = job.deepy.replace("%", "%%")
    tell = (*pdsh, shlex.join([sys.executable.replace("%", "%%"), deepy, TELL_FLAG, NODE, description.name]))
    return Start(
        description.world_size,
        (Command((*pdsh, node_command(description, NODE, deepy)), VARIABLES),),
        partial(tell_by_pdsh, tell),
        (Command((*pdsh, "true"), VARIABLES),),
        tuple(description.hosts),
        description.explanation(),
    )


def tell_by_pdsh(command: tuple[str, ...], processes: Processes, number: int) -> None:
    """Tells the process on every machine by another pdsh, which is not waited for."""
    subprocess.Popen([*command, str(number)], env=os.environ | VARIABLES, stdin=subprocess.DEVNULL)


LAUNCHERS.register("pdsh")(Launcher(start=start_by_pdsh, program="pdsh"))
