"""Several ranks are watched: the one that fails is named last, the others end, and nothing is left, whatever is killed.

Ranks are a small script that imports no torch, started by deepy.py as any other. Two "nodes" are this machine: an ssh
of the test's own runs what it is given in a shell, as sshd does.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers.configs import TOKENFORMER
from tests.helpers.forkserver import ROOT

RANK = """\
import json, os, pathlib, signal, subprocess, sys, time
from megatron.errors import STOPPED_ON_REQUEST, DataError, exit_on_user_error

rank = os.environ["RANK"]
folder = pathlib.Path("notes")

def note(number, frame):
    (folder / f"signal{number}.rank{rank}").touch()
    if how != "deaf":
        sys.exit(STOPPED_ON_REQUEST)

def main():
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    if how == "leaves a child":
        ignoring = "import signal, time; signal.signal(15, 1); print('deaf', flush=True); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", ignoring], stdout=subprocess.PIPE, start_new_session=True)
        child.stdout.readline()
    (folder / f"ready.rank{rank}").write_text(json.dumps(dict(os.environ)))
    while len(list(folder.glob("ready.*"))) < 2:
        time.sleep(0.02)
    if rank == "1":
        if how == "raises":
            time.sleep(0.5)
            raise ValueError("boom of rank 1")
        if how == "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        if how in {"exits", "leaves a child", "deaf"}:
            os._exit(7)
    if how == "all refuse":
        raise DataError("data.bin: cut off")
    if how == "raises":
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4")
    time.sleep(600)
    return 0

how = pathlib.Path("how").read_text()
exit_on_user_error(main)
"""

SSH = """\
#!/bin/sh
# ssh without a network: options, a host, and a line for a shell in another folder than that of the start.
while [ "${1#-}" != "$1" ]; do shift 2; done
echo "$1" >> "$SSH_NOTES"
cd /; exec sh -c "$2"
"""


class Launched:
    """A folder, with spaces and a semicolon in its name, in which deepy.py runs the script above."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder = folder / "a folder; of ranks"
        (self.folder / "notes").mkdir(parents=True)
        (self.folder / "rank.py").write_text(RANK)
        shutil.copy(config, self.folder / "tiny.yml")
        programs = folder / "programs"
        programs.mkdir()
        (programs / "ssh").write_text(SSH)
        (programs / "ssh").chmod(0o700)
        (self.folder / "hosts").write_text("localhost slots=1\n127.0.0.2 slots=1\n")
        self.environment = os.environ | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools" / "start")]),
            "SSH_NOTES": str(folder / "hosts of ssh"),
            "WANDB_API_KEY": "planted",
        }

    def start(self, how: str, *keys: str) -> subprocess.Popen[str]:
        (self.folder / "how").write_text(how)
        return subprocess.Popen(
            [sys.executable, str(ROOT / "deepy.py"), "rank.py", "tiny.yml", *keys],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, how: str, *keys: str) -> tuple[int, list[str]]:
        """Returns the exit code and the lines of the output; nothing may be left."""
        running = self.start(how, *keys)
        output, _ = running.communicate(timeout=60)
        self.wait_for_nobody(0.0)
        return running.returncode, output.splitlines()

    def wait_for_ranks(self) -> None:
        deadline = time.monotonic() + 60
        while len(list((self.folder / "notes").glob("ready.*"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cwd() == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def wait_for_nobody(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < deadline, left
            time.sleep(0.05)

    def signals(self) -> list[str]:
        return sorted(file.name for file in (self.folder / "notes").glob("signal*"))


@pytest.fixture
def launched(tmp_path: Path, write_config: Callable[..., Path]) -> Iterator[Launched]:
    found = Launched(tmp_path, write_config(TOKENFORMER))
    yield found
    for process in found.processes():
        process.kill()


HERE = ("num_gpus=2",)
TWO_NODES = ("hostfile=hosts", "no_ssh_check=true")
HOST = socket.gethostname()
on_two_nodes_and_here = pytest.mark.parametrize(
    "place", [pytest.param(TWO_NODES, id="two nodes"), pytest.param(HERE, id="here", marks=pytest.mark.full)]
)
here_and_on_two_nodes = pytest.mark.parametrize(
    "place", [pytest.param(HERE, id="here"), pytest.param(TWO_NODES, id="two nodes", marks=pytest.mark.full)]
)


@on_two_nodes_and_here
def test_the_traceback_of_the_rank_that_failed_comes_last(place: tuple[str, ...], launched: Launched) -> None:
    code, lines = launched.run("raises", *place)
    assert code == 1
    assert lines[-1] == "ValueError: boom of rank 1"
    start = lines.index(f"rank 1 on host {HOST} ended with exit code 1:")
    assert lines[start + 1] == "Traceback (most recent call last):"
    secondary = (
        f"secondary: rank 0 on host {HOST} ended with exit code 1: RuntimeError: [gloo/transport/tcp/pair.cc:534]"
    )
    assert lines[start - 1].startswith(secondary)


@here_and_on_two_nodes
def test_a_killed_rank_is_named_with_its_signal(place: tuple[str, ...], launched: Launched) -> None:
    code, lines = launched.run("kills", *place)
    assert code == 128 + signal.SIGKILL
    assert lines[-1] == f"rank 1 on host {HOST} was killed by signal 9 (SIGKILL)"
    assert launched.signals() == [f"signal{signal.SIGTERM.value}.rank0"]


@pytest.mark.full
def test_the_exit_code_is_that_of_the_rank(launched: Launched) -> None:
    code, lines = launched.run("exits", *HERE)
    assert (code, lines[-1]) == (7, f"rank 1 on host {HOST} ended with exit code 7")


def test_what_all_ranks_refuse_is_said_once(launched: Launched) -> None:
    code, lines = launched.run("all refuse", *HERE)
    assert code == 1
    assert [line for line in lines if "cut off" in line] == ["DataError: data.bin: cut off"]


@pytest.mark.full
def test_a_rank_that_does_not_end_is_killed_after_the_grace_period(launched: Launched) -> None:
    begin = time.monotonic()
    code, lines = launched.run("deaf", *HERE, "termination_grace_seconds=3")
    assert code == 7
    assert lines[-2:] == [
        "rank 0 did not end within the grace period and was killed",
        f"rank 1 on host {HOST} ended with exit code 7",
    ]
    assert time.monotonic() - begin > 3


@pytest.mark.full
def test_what_a_rank_has_started_is_ended_too(launched: Launched) -> None:
    """It is in a session of its own, and hears no SIGTERM."""
    code, _ = launched.run("leaves a child", *HERE)
    assert code == 7


@on_two_nodes_and_here
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(other, marks=pytest.mark.full) for other in (signal.SIGUSR1, signal.SIGINT))],
)
def test_signals_reach_every_rank(number: signal.Signals, place: tuple[str, ...], launched: Launched) -> None:
    running = launched.start("waits", *place)
    launched.wait_for_ranks()
    time.sleep(0.5)
    running.send_signal(number)
    output, _ = running.communicate(timeout=30)
    assert running.returncode == 75, output
    assert launched.signals() == [f"signal{number.value}.rank{rank}" for rank in range(2)]


@on_two_nodes_and_here
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_ranks_end_with_a_launcher_that_is_killed(place: tuple[str, ...], launched: Launched) -> None:
    running = launched.start("waits", *place, "termination_grace_seconds=2")
    launched.wait_for_ranks()
    running.kill()
    running.wait()
    launched.wait_for_nobody(10.0)


@pytest.mark.full
def test_ranks_of_two_nodes_have_their_places_and_no_secret(launched: Launched) -> None:
    running = launched.start("waits", *TWO_NODES)
    launched.wait_for_ranks()
    words = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert any("--on-node 1" in word for word in words)
    assert not any("planted" in word for word in words)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=30)
    assert sorted(Path(launched.environment["SSH_NOTES"]).read_text().split()) == ["127.0.0.2", "localhost"]
    texts = [(launched.folder / "notes" / f"ready.rank{rank}").read_text() for rank in range(2)]
    for rank, text in enumerate(texts):
        assert re.search(rf'"RANK": "{rank}".*"LOCAL_RANK": "0".*"WORLD_SIZE": "2".*"MASTER_ADDR": "localhost"', text)


def test_a_machine_that_cannot_be_reached_is_named_before_anything_starts(launched: Launched) -> None:
    ssh = Path(launched.environment["PATH"].split(os.pathsep)[0]) / "ssh"
    ssh.write_text(
        '#!/bin/sh\nfor word; do [ "$word" = 127.0.0.2 ] && { echo "No route" >&2; exit 255; }; done; exit 0\n'
    )
    code, lines = launched.run("waits", "hostfile=hosts")
    assert code == 1
    assert lines[0] == "EnvironmentSetupError: not every machine of the hostfile can be reached:"
    assert lines[1] == "127.0.0.2: No route"
    assert not list((launched.folder / "notes").glob("ready.*"))


@pytest.mark.full
def test_a_machine_that_is_lost_is_named(launched: Launched) -> None:
    """Its ssh ends; the ranks of the other machine end within the grace period."""
    running = launched.start("waits", *TWO_NODES, "termination_grace_seconds=5")
    launched.wait_for_ranks()
    node = next(process for process in launched.processes() if "--on-node 1 " in " ".join(process.cmdline()))
    node.kill()
    output, _ = running.communicate(timeout=40)
    assert running.returncode == 128 + signal.SIGKILL
    assert output.splitlines()[-1] == "ssh on 127.0.0.2 ended with exit code 137; nothing was heard of how rank 1 ended"
    launched.wait_for_nobody(10.0)
