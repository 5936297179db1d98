"""Ranks on other machines, or under srun or mpirun: starts the commands, hears what happens, ends what must end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import IO, Any, cast

from megatron.errors import INTERRUPTED, STOPPED_ON_REQUEST, EnvironmentSetupError
from megatron.launch.failures import Failure, Outcome, code_of, first_failure, print_failures
from megatron.launch.launcher import END, Command, Start
from megatron.launch.messages import MessageReader
from megatron.launch.orphans import no_orphans
from megatron.launch.supervise import POLL_SECONDS, SETTLE_SECONDS, forward_signals
from megatron.rank_channel import end_with_parent

START_SECONDS = 120.0
"""Time that machines have to start their ranks after the first of them has."""
CHECK_SECONDS = 60.0
LAST_WORDS_SECONDS = 10.0
"""Time beyond the grace period in which machines tell how their ranks have ended."""


def require_reachable(start: Start) -> None:
    """Tries to reach every machine. Raises EnvironmentSetupError that names those that cannot be, and why."""
    tries = [(command, _popen(command, subprocess.PIPE)) for command in start.checks]
    problems: list[str] = []
    for command, process in tries:
        try:
            _, output = process.communicate(timeout=CHECK_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            output = f"no answer in {CHECK_SECONDS:g} s".encode()
        if process.returncode != 0:
            said = output.decode(errors="replace").strip() or f"{command.argv[0]} ended with {process.returncode}"
            problems.append(f"{command.host}: {said}" if command.host else said)
    if problems:
        raise EnvironmentSetupError(
            "not every machine of the hostfile can be reached:\n"
            + "\n".join(problems)
            + f"\nTry `{tries[0][0].shown()}`; it must work without a password. Options for it go into launcher_args."
        )


def run_elsewhere(start: Start, grace_seconds: float) -> int:
    """Runs the commands until all ranks have ended, and returns the exit code of the run.

    When a rank fails, the others have `grace_seconds` [s] to end.
    """
    with no_orphans():
        watch = _Watch(start, grace_seconds)
        watch.run()
    return watch.report()


class _Watch:
    """A start, and what has been heard of it."""

    def __init__(self, start: Start, grace_seconds: float) -> None:
        self.start = start
        self.grace_seconds = grace_seconds
        self.processes: list[subprocess.Popen[bytes]] = []
        self.nodes: set[int] = set()
        self.failures: dict[int, Failure] = {}
        self.outcomes: list[Outcome] = []
        self.first_up = float("inf")
        self.stopped_early = 0
        """Signal that has come before every machine had started its ranks; 0 without any."""
        self.problem = ""
        """What has gone wrong without a rank that could tell of it."""
        self.code = 0
        """Exit code where no rank has one."""

    @property
    def is_up(self) -> bool:
        return len(self.nodes) == len(self.start.nodes)

    def run(self) -> None:
        """Returns when every command has ended, and all that they wrote has been read."""
        forward_signals(self.pass_on)
        for command in self.start.commands:
            self.processes.append(_popen(command, subprocess.PIPE, stdout=None))
        readers = [threading.Thread(target=self.read, args=[process]) for process in self.processes]
        for reader in readers:
            reader.start()
        ending = float("inf")
        is_told = False
        while any(process.poll() is None for process in self.processes):
            now = time.monotonic()
            if self.must_end(now):
                ending = min(ending, now)
            if now >= ending + (0.0 if self.stopped_early else SETTLE_SECONDS) and not is_told:
                self.start.tell(self.processes, END)
                is_told = True
            if now >= ending + self.grace_seconds + LAST_WORDS_SECONDS:
                for process in self.processes:
                    process.kill()
            time.sleep(POLL_SECONDS)
        self.must_end(time.monotonic())
        for reader in readers:
            reader.join()

    def pass_on(self, number: int) -> None:
        """Gives all ranks a signal. Before they have all been started there is nothing that they could save."""
        if self.is_up:
            self.start.tell(self.processes, number)
        else:
            self.stopped_early = number
            for process in self.processes:
                process.kill()

    def must_end(self, now: float) -> bool:
        """Tells whether something has gone wrong, and notes what no rank tells of."""
        if self.failures or self.problem or self.stopped_early:
            return True
        for command, process in zip(self.start.commands, self.processes, strict=True):
            code = process.poll()
            if code:
                self.code = code if code > 0 else 128 - code
                where = f" on {command.host}" if command.host else ""
                self.problem = f"{command.argv[0]}{where} ended with exit code {self.code}"
                return True
        if self.start.nodes and not self.is_up and now > self.first_up + START_SECONDS:
            missing = [host for number, host in enumerate(self.start.nodes) if number not in self.nodes]
            self.code = 1
            self.problem = f"{', '.join(missing)} did not start any rank within {START_SECONDS:g} s"
        return bool(self.problem)

    def read(self, process: subprocess.Popen[bytes]) -> None:
        """Reads what a command writes to standard error, until its end."""
        reader = MessageReader(sys.stderr.buffer, self.receive)
        while chunk := os.read(cast(IO[bytes], process.stderr).fileno(), 1 << 16):
            reader.feed(chunk)
        reader.close()

    def receive(self, kind: str, content: dict[str, Any]) -> None:
        """Takes a message of those who watch the ranks."""
        if kind == "up":
            self.nodes.add(content["node"])
            self.first_up = min(self.first_up, time.monotonic())
        elif kind == "failing":
            failure = Failure.from_json(content)
            self.failures[failure.rank] = failure
        elif kind == "outcome":
            outcome = Outcome.from_json(content)
            self.outcomes.append(outcome)
            self.failures |= {failure.rank: failure for failure in outcome.failures}

    def report(self) -> int:
        """Prints what has gone wrong, the reason last, and returns the exit code."""
        if self.stopped_early:
            return INTERRUPTED if self.stopped_early == signal.SIGINT else STOPPED_ON_REQUEST
        failures = tuple(self.failures.values())
        ranks = {rank for outcome in self.outcomes for rank in outcome.ranks}
        killed = tuple(sorted(rank for outcome in self.outcomes for rank in outcome.killed))
        code = code_of(failures, (outcome.code for outcome in self.outcomes))
        print_failures(Outcome(tuple(sorted(ranks)), code, failures, killed))
        first = first_failure(failures)
        silent = sorted(set(range(self.start.world_size)) - ranks)
        if silent and not self.problem and first is None:
            self.problem, self.code = "the ranks' launcher has ended", 1
        if self.problem and (first is None or first.lost_peer):
            lost = f"; nothing was heard of how rank {', '.join(map(str, silent))} ended" if silent else ""
            print(f"{self.problem}{lost}", file=sys.stderr)
            return self.code
        return code


def _popen(command: Command, stderr: int, stdout: int | None = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """Starts a command, which ends when this process does, and gets no signals from the terminal: we pass them on."""
    return subprocess.Popen(
        command.argv,
        env={**os.environ, **command.variables},
        stdin=subprocess.PIPE if command.keep_stdin else subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),  # noqa: PLW1509 - no thread runs yet
    )


def shown(start: Start) -> Sequence[str]:
    """Returns the lines that a shell would need for the commands, and what they do not show."""
    return [*(command.shown() for command in start.commands), *start.explanation.splitlines()]
