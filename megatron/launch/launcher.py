"""Launchers: the variables by which each tells a process its place, and the commands that start ranks with it.

Each is a file in launchers/, called by the launcher's name.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron.config.sections.launch import LaunchConfig
from megatron.launch.hostfile import Node
from megatron.registry import Registry

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """Place of a process among the ranks of a run."""

    rank: int
    """Rank among all processes, from 0."""
    world_size: int
    """Number of ranks."""
    local_rank: int
    """Number of its GPU among those that it sees, from 0."""


@dataclass(frozen=True)
class LauncherVariables:
    """Names of the environment variables by which a launcher tells a process its place.

    Called with an environment, it reads the place, or returns None where one of them is missing.
    """

    rank: str
    world_size: str
    local_rank: str

    def __call__(self, environment: Environment) -> Place | None:
        names = (self.rank, self.world_size, self.local_rank)
        if not all(name in environment for name in names):
            return None
        return Place(*(int(environment[name]) for name in names))


@dataclass(frozen=True)
class Job:
    """A script to be started on ranks."""

    deepy: str
    """Absolute path of deepy.py, which watches ranks elsewhere too."""
    script: str
    """Absolute path of the script that each rank runs."""
    arguments: tuple[str, ...]
    """Those of the script."""
    config: LaunchConfig
    nodes: tuple[Node, ...]
    """Machines of the hostfile that take part; none where there is no hostfile."""
    folder: str
    """Working directory."""
    environment: Environment
    """Variables of the process that starts it."""

    @property
    def rank_command(self) -> tuple[str, ...]:
        """Returns what runs as a rank."""
        return (sys.executable, self.script, *self.arguments)

    @property
    def task_command(self) -> tuple[str, ...]:
        """Returns what srun or mpirun starts for each rank, with output that Python does not hold back."""
        return (sys.executable, "-u", self.deepy, self.script, *self.arguments)


@dataclass(frozen=True)
class Command:
    """A process of this machine through which ranks are started."""

    argv: tuple[str, ...]
    variables: Environment = field(default_factory=dict)
    """What its environment has beside that of deepy.py."""
    host: str = ""
    """Machine that it reaches, where it is for one alone."""
    keep_stdin: bool = False
    """Whether its standard input is a pipe of ours, by which the other end learns that we have ended."""

    def shown(self) -> str:
        """Returns the line that a shell would need for it."""
        return shlex.join([*(f"{name}={value}" for name, value in self.variables.items()), *self.argv])


Processes = Sequence[subprocess.Popen[bytes]]
END = 0
"""What `Start.tell` sends to have all ranks ended within the grace period; no signal has this number."""


@dataclass(frozen=True)
class Start:
    """Ways to start ranks elsewhere, and to reach them."""

    world_size: int
    commands: tuple[Command, ...]
    tell: Callable[[Processes, int], None]
    """Gives the processes of the commands a signal for all ranks, or END."""
    checks: tuple[Command, ...] = ()
    """Commands that fail where a machine cannot be reached, and start nothing."""
    nodes: tuple[str, ...] = ()
    """Machines that say when they have started their ranks; none where the launcher itself sees to that."""
    explanation: str = ""
    """What the commands do not show of what they start."""


@dataclass(frozen=True)
class Launcher:
    """A way to start ranks."""

    place: Callable[[Environment], Place | None] = lambda environment: None
    """Reads a process's place from its environment; None where this launcher has not started it."""
    meeting_point: Callable[[Environment], tuple[str, int] | None] = lambda environment: None
    """Derives the address and port that all ranks find alike where MASTER_ADDR and MASTER_PORT are not given."""
    start: Callable[[Job], Start] | None = None
    """Prepares commands that start ranks; None where deepy.py starts processes of this machine, or none."""
    program: str = ""
    """What must be installed for that."""
    is_parent: Callable[[Environment], bool] = lambda environment: True
    """Tells whether the parent of a process that has a place is the launcher, and not a shell that set variables."""
    order: int = 1
    """Order of asking for a place: where one launcher runs in another, the inner one counts."""


LAUNCHERS: Registry[Launcher] = Registry("launcher", package="megatron.launch.launchers")
