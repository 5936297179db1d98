"""The reason of a failed run: the rank that was the first, and what of the others only follows from it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from megatron.errors import INTERRUPTED, STOPPED_ON_REQUEST

GOOD_CODES = frozenset({0, STOPPED_ON_REQUEST})
"""Exit codes of a rank that has done what it was asked for."""


@dataclass(frozen=True)
class Failure:
    """The end of a rank that should not have ended so."""

    rank: int
    host: str
    code: int
    """Its exit code, or -N for signal N."""
    time: float
    """Moment at which it failed [s since 1970, by the clock of its machine]."""
    text: str = ""
    """What the rank has said of it: a traceback, or the message of a UserError."""
    lost_peer: bool = False
    """Whether what it met was a broken connection to another rank."""

    @classmethod
    def from_json(cls, words: Mapping[str, Any]) -> Failure:
        """Reads what `vars` gave."""
        return cls(**words)

    @property
    def exit_code(self) -> int:
        """Returns the exit code as shells have it."""
        return self.code if self.code >= 0 else 128 - self.code

    @property
    def title(self) -> str:
        """Says which rank has ended, and how."""
        where = f"rank {self.rank} on host {self.host}"
        if self.code >= 0:
            return f"{where} ended with exit code {self.code}"
        try:
            name = signal.Signals(-self.code).name
        except ValueError:
            return f"{where} was killed by signal {-self.code}"
        return f"{where} was killed by signal {-self.code} ({name})"


@dataclass(frozen=True)
class Outcome:
    """The end of ranks."""

    ranks: tuple[int, ...]
    """The ranks that it tells of."""
    code: int
    """Exit code of the run, as far as these ranks know."""
    failures: tuple[Failure, ...] = ()
    killed: tuple[int, ...] = ()
    """Ranks that did not end within the grace period."""

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads."""
        return {**vars(self), "failures": [vars(failure) for failure in self.failures]}

    @classmethod
    def from_json(cls, words: Mapping[str, Any]) -> Outcome:
        """Reads what `to_json` gave."""
        failures = tuple(map(Failure.from_json, words["failures"]))
        own = dict(words) | {"ranks": tuple(words["ranks"]), "killed": tuple(words["killed"]), "failures": failures}
        return cls(**own)


def first_failure(failures: Iterable[Failure]) -> Failure | None:
    """Chooses the failure that the others follow from: the earliest that is no broken connection, else the earliest."""
    return min(failures, key=lambda failure: (failure.lost_peer, failure.time), default=None)


def code_of(failures: Sequence[Failure], codes: Iterable[int]) -> int:
    """Returns the exit code of a run: that of its first failure, else STOPPED_ON_REQUEST where a rank has it."""
    first = first_failure(failures)
    return max(codes, default=0) if first is None else first.exit_code


def print_failures(outcome: Outcome, output: TextIO | None = None) -> None:
    """Prints what has gone wrong, the reason last: what other ranks met when it had happened is marked as secondary.

    What all ranks say alike is said once. Ctrl-C is no failure, and rank 0 has spoken of it.
    """
    output = output or sys.stderr
    failures = [failure for failure in outcome.failures if failure.code != INTERRUPTED]
    first = first_failure(failures)
    if first is None:
        return
    for rank in outcome.killed:
        print(f"rank {rank} did not end within the grace period and was killed", file=output)
    others = [
        failure for failure in failures if failure is not first and (not first.text or failure.text != first.text)
    ]
    for failure in sorted(others, key=lambda failure: failure.rank):
        last = failure.text.strip().splitlines()[-1:]
        print(": ".join([f"secondary: {failure.title}", *last]), file=output)
    everybody = len(failures) > 1 and not others
    if everybody and first.text:
        print(first.text, file=output, flush=True)
    elif first.text:
        print(f"{first.title}:\n{first.text}", file=output, flush=True)
    else:
        print(first.title, file=output, flush=True)
