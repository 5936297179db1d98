"""Starts ranks on this machine and watches them: signals go to all of them, and one that fails ends the others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from megatron.errors import INTERRUPTED, STOPPED_ON_REQUEST
from megatron.launch.failures import GOOD_CODES, Failure, Outcome, code_of
from megatron.rank_channel import CHANNEL_VARIABLE, LISTENER_VARIABLE, LONGEST_REPORT

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_SECONDS = 0.1
SETTLE_SECONDS = 2.0
"""Time that ranks have to notice by themselves that another one has failed, and to say so, before they are ended."""


@dataclass(frozen=True)
class RankProcess:
    """A rank that has been started here."""

    rank: int
    process: subprocess.Popen[bytes]
    channel: int
    """Reading end of the pipe on which it reports."""

    def failure(self, host: str) -> Failure:
        """Returns how it has failed: what it has reported, or else its exit code alone."""
        report: dict[str, object] = {"time": time.time()}
        # It has written nothing, or was killed while it wrote.
        with contextlib.suppress(BlockingIOError, ValueError):
            report |= json.loads(os.read(self.channel, 4 * LONGEST_REPORT) or b"{}")
        words = {"rank": self.rank, "host": host, "code": self.process.returncode, **report}
        return Failure.from_json(words)


class Supervisor:
    """Ranks of this machine, from the start of the first to the end of the last."""

    def __init__(self, grace_seconds: float, on_failure: Callable[[Failure], None] = lambda failure: None) -> None:
        """Prepares the watch. When a rank fails, `on_failure` is told, and others have `grace_seconds` [s] to end."""
        self.host = socket.gethostname()
        self._grace_seconds = grace_seconds
        self._on_failure = on_failure
        self._ranks: list[RankProcess] = []
        self._signals: list[int] = []
        self._sent: set[tuple[int, int]] = set()
        self._must_end = False

    def start(
        self, command: Sequence[str], rank: int, environment: Mapping[str, str], listener: int | None = None,
        stdin: int | None = None,
    ) -> None:  # fmt: skip
        """Starts a rank, which inherits the socket `listener` where it is given."""
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        own = {CHANNEL_VARIABLE: f"{writing}:{os.getpid()}"}
        if listener is not None:
            own[LISTENER_VARIABLE] = str(listener)
        process = subprocess.Popen(
            command,
            env={**environment, **own},
            stdin=stdin,
            pass_fds=[writing, *([] if listener is None else [listener])],
        )
        os.close(writing)
        self._ranks.append(RankProcess(rank, process, reading))
        for number in self._signals:
            self._send(self._ranks[-1], number)

    def signal(self, number: int) -> None:
        """Sends a signal to every rank, also to those that are still to be started."""
        self._signals.append(number)
        for rank in self._ranks:
            self._send(rank, number)

    def end(self) -> None:
        """Ends all ranks, within the grace period."""
        self._must_end = True

    def wait(self) -> Outcome:
        """Waits for all ranks. The first that fails ends the others, within the grace period."""
        while not self._must_end:
            if any(map(self._has_failed, self._ranks)):
                break
            if all(rank.process.poll() is not None for rank in self._ranks):
                break
            time.sleep(POLL_SECONDS)
        failures = {rank.rank: rank.failure(self.host) for rank in self._ranks if self._has_failed(rank)}
        for failure in failures.values():
            self._on_failure(failure)
        ended = self._end_others(failures)
        for rank in self._ranks:
            os.close(rank.channel)
        good = [self._code(rank) or 0 for rank in self._ranks if rank.rank not in failures and rank.rank not in ended]
        failed = tuple(failures.values())
        numbers = tuple(rank.rank for rank in self._ranks)
        return Outcome(numbers, code_of(failed, good), failed, ended)

    def _end_others(self, failures: dict[int, Failure]) -> tuple[int, ...]:
        """Waits, then terminates, then kills; adds the failures of those that end by themselves. Returns the killed."""
        begin = time.monotonic()
        running = [rank for rank in self._ranks if rank.rank not in failures]
        self._wait_for(running, begin + min(SETTLE_SECONDS, self._grace_seconds))
        told = {rank.rank for rank in running if rank.process.poll() is None}
        for rank in running:
            if rank.rank in told:
                self._send(rank, signal.SIGTERM)
        self._wait_for(running, begin + self._grace_seconds)
        killed = tuple(rank.rank for rank in running if rank.process.poll() is None)
        for rank in running:
            rank.process.kill()
            rank.process.wait()
            # One that ends as it was told to has not failed.
            if self._has_failed(rank) and rank.rank not in killed:
                failure = rank.failure(self.host)
                if rank.rank not in told or failure.text:
                    failures[rank.rank] = failure
        return killed

    def _send(self, rank: RankProcess, number: int) -> None:
        if rank.process.poll() is None:
            self._sent.add((rank.rank, number))
            rank.process.send_signal(number)

    def _code(self, rank: RankProcess) -> int | None:
        """Returns the exit code; None while the rank runs.

        Python does not handle signals in its first moments and its last: what a signal of ours does then is no failure.
        """
        code = rank.process.poll()
        if code is not None and (rank.rank, -code) in self._sent:
            return INTERRUPTED if -code == signal.SIGINT else STOPPED_ON_REQUEST
        return code

    def _has_failed(self, rank: RankProcess) -> bool:
        return self._code(rank) not in {None, *GOOD_CODES}

    def _wait_for(self, ranks: Sequence[RankProcess], deadline: float) -> None:
        while time.monotonic() < deadline and any(rank.process.poll() is None for rank in ranks):
            time.sleep(POLL_SECONDS)


def forward_signals(send: Callable[[int], None]) -> None:
    """Gives every signal that this process gets from now on to `send`."""

    def forward(number: int, frame: FrameType | None) -> None:
        send(number)

    for number in FORWARDED_SIGNALS:
        signal.signal(number, forward)
