"""Ranks on the machines of a hostfile, reached by ssh: one process on each starts its ranks and watches them.

It is told what to start by its arguments, which hold nothing secret. Its standard input is open for as long as whoever
has started it lives; at its end, the ranks end too. So nothing is left on a machine that nobody watches.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.launch.exported import exported
from megatron.launch.failures import Failure, Outcome
from megatron.launch.launcher import END, Job, Place
from megatron.launch.messages import send
from megatron.launch.rank_environment import rank_environment
from megatron.launch.supervise import Supervisor, forward_signals

NODE_FLAG = "--on-node"
"""First word of deepy.py's arguments where it is to start the ranks of one machine."""
TELL_FLAG = "--tell-node"
"""First word where it is to hand a signal to the process that does."""
PORTS = range(20_000, 32_000)
"""Ports that systems give to nobody by themselves."""


@dataclass(frozen=True)
class NodeJob:
    """Description of what each machine is to start."""

    words: list[str]
    slots: list[list[int]]
    """Numbers of the GPUs of each machine, in the order of the ranks."""
    hosts: list[str]
    folder: str
    environment: dict[str, str]
    master_addr: str
    master_port: int
    grace_seconds: float
    name: str
    """Drawn name of the start, by which its processes are found."""
    by_socket: bool
    """Whether signals come by a socket of the file system, because standard input carries none."""

    @classmethod
    def of(cls, job: Job, *, by_socket: bool) -> NodeJob:
        """Describes a job for the machines of its hostfile."""
        config = job.config
        return cls(
            words=list(job.rank_command),
            slots=[list(node.slots) for node in job.nodes],
            hosts=[node.host for node in job.nodes],
            folder=job.folder,
            environment=exported(job.environment),
            master_addr=config.master_addr or job.nodes[0].host,
            master_port=config.master_port or draw_port(),
            grace_seconds=config.termination_grace_seconds,
            name=secrets.token_hex(8),
            by_socket=by_socket,
        )

    @property
    def world_size(self) -> int:
        """Counts the ranks of all machines."""
        return sum(map(len, self.slots))

    def encode(self) -> str:
        """Writes it as a word that no shell, and neither ssh nor pdsh, reads anything into."""
        return base64.urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode()

    @classmethod
    def decode(cls, word: str) -> NodeJob:
        """Reads what `encode` gave."""
        return cls(**json.loads(base64.urlsafe_b64decode(word)))

    def explanation(self) -> str:
        """Says what the word holds, line by line."""
        lines, first = [], 0
        for host, slots in zip(self.hosts, self.slots, strict=True):
            ranks = f"rank {first}" if len(slots) == 1 else f"ranks {first} to {first + len(slots) - 1}"
            lines.append(f"# {host}: {ranks} on the slots {', '.join(map(str, slots))}")
            first += len(slots)
        meeting = {"MASTER_ADDR": self.master_addr, "MASTER_PORT": str(self.master_port)}
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in (self.environment | meeting).items())
        return "\n".join([*lines, f"# each: cd {shlex.quote(self.folder)}; {variables} {shlex.join(self.words)}"])


def draw_port() -> int:
    """Draws a port for ranks of several machines: which are free on the first of them, only that one knows."""
    return random.SystemRandom().choice(PORTS)


def node_command(job: NodeJob, node: str, deepy: str) -> str:
    """Returns the line for the shell of a machine, which is `node`, by its number."""
    return shlex.join([sys.executable, deepy, NODE_FLAG, node, job.encode()])


def run_node(arguments: Sequence[str]) -> int:
    """Starts the ranks of one machine and watches them; what happens is told in messages. Returns 0 when it has been.

    `arguments` are the number of the machine and an encoded NodeJob.
    """
    node, job = int(arguments[0]), NodeJob.decode(arguments[1])
    first = sum(map(len, job.slots[:node]))
    slots = job.slots[node]
    supervisor = Supervisor(job.grace_seconds, lambda failure: send("failing", vars(failure)))
    try:
        os.chdir(job.folder)
    except OSError as error:
        text = f"{job.hosts[node]}: {job.folder}: {error.strerror}. The working folder must exist on every machine."
        failure = Failure(first, supervisor.host, 2, 0.0, f"EnvironmentSetupError: {text}")
        send("outcome", Outcome((first,), 2, (failure,)).to_json())
        return 0
    forward_signals(supervisor.signal)
    with _listening(job, node, supervisor):
        variables = {"PYTHONUNBUFFERED": "1", **os.environ, **job.environment}
        for local_rank in range(len(slots)):
            place = Place(first + local_rank, job.world_size, local_rank)
            environment = rank_environment(variables, place, (job.master_addr, job.master_port), slots)
            supervisor.start(job.words, place.rank, environment, stdin=subprocess.DEVNULL)
        send("up", {"node": node})
        outcome = supervisor.wait()
    send("outcome", outcome.to_json())
    return 0


@contextmanager
def _listening(job: NodeJob, node: int, supervisor: Supervisor) -> Iterator[None]:
    """Passes on what comes by standard input and, where the job says so, by a socket that only this user can reach."""

    def read_stdin() -> None:
        # Not by sys.stdin, whose lock Python wants at its end.
        with os.fdopen(os.dup(0), "rb", buffering=0) as channel:
            while line := channel.readline():
                _obey(int(line), supervisor)
        supervisor.end()

    threading.Thread(target=read_stdin, daemon=True).start()
    if not job.by_socket:
        yield
        return
    folder = _socket_folder(job.name, node)
    folder.mkdir(mode=0o700)
    path = folder / "socket"
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def serve() -> None:
        while True:
            connection, _ = server.accept()
            with connection:
                _obey(int(connection.recv(8)), supervisor)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield
    finally:
        path.unlink()
        folder.rmdir()


def tell_node(arguments: Sequence[str]) -> int:
    """Hands a signal, or END, to the process that runs the ranks of this machine, if there still is one. Returns 0.

    `arguments` are the number of the machine, the name of the start, and the signal's number.
    """
    node, name, number = arguments
    with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
        client.connect(str(_socket_folder(name, int(node)) / "socket"))
        client.sendall(number.encode())
    return 0


def _obey(number: int, supervisor: Supervisor) -> None:
    if number == END:
        supervisor.end()
    elif number in {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}:
        supervisor.signal(number)


def _socket_folder(name: str, node: int) -> Path:
    # In the temporary folder of a login: a TMPDIR of the start is not known to those that look for it.
    return Path(tempfile.gettempdir()) / f"deepy-{os.getuid()}-{name}-{node}"
