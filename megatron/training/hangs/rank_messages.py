"""Messages between the watchdogs of a run, through the store in which its ranks have met."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import distributed

from megatron.training.hangs.rank_state import RankState

POLL_SECONDS = 0.1
_ASKED, _TOLD = "a hang is reported", "the report is written"


@dataclass(frozen=True)
class HangNotice:
    """The call of one rank to all others to report."""

    rank: int
    """The rank that noticed, which writes the report."""
    reason: str
    """Sentence that says what takes too long."""
    folder: str
    """Name of the report's folder."""
    exit_code: int
    """Exit code of all ranks."""


class RankMessages:
    """A rank's connection to the store. Each call may wait for ever where the store's process is stopped."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._store = store

    @staticmethod
    def connect() -> RankMessages | None:
        """Opens a connection to the store of the process group, which exists; returns None for one rank alone."""
        if distributed.get_world_size() == 1:
            return None
        # A connection of its own: another one is busy while the main thread waits for what it asked for.
        store: Any = distributed.distributed_c10d._get_default_store()  # its annotations lack `clone`
        return RankMessages(store.clone(), distributed.get_rank(), distributed.get_world_size())

    def tell(self, state: RankState) -> None:
        """Tells the state of this rank, in the place of what it told before."""
        self._store.set(_beat(self.rank), state.encode())

    def heard(self, ranks: Iterable[int]) -> dict[int, RankState | None]:
        """Returns what these ranks have told last; None where they never have."""
        return {rank: self._read(_beat(rank)) for rank in ranks}

    def others(self) -> dict[int, RankState | None]:
        """Returns what the other ranks have told last."""
        return self.heard(rank for rank in range(self.size) if rank != self.rank)

    def notify(self, notice: HangNotice) -> None:
        """Calls on all ranks to report, unless another one has done so already."""
        self._store.compare_set(_ASKED, "", json.dumps(asdict(notice)))

    def notice(self) -> HangNotice | None:
        """Returns the call to report, once there is one."""
        return HangNotice(**json.loads(self._store.get(_ASKED))) if self._store.check([_ASKED]) else None

    def answer(self, state: RankState) -> None:
        """Answers the call."""
        self._store.set(_answer(self.rank), state.encode())

    def answers(self, seconds: float) -> dict[int, RankState]:
        """Returns the answers, by rank, once all are there or so many seconds have passed [s]."""
        keys = [_answer(rank) for rank in range(self.size)]
        _poll(lambda: self._store.check(keys), seconds)
        found = {rank: self._read(key) for rank, key in enumerate(keys)}
        return {rank: state for rank, state in found.items() if state is not None}

    def end(self) -> None:
        """Tells the others that the report is written."""
        self._store.set(_TOLD, b"")

    def wait_for_end(self, seconds: float) -> None:
        """Waits until the report is written, at most so long [s]."""
        _poll(lambda: self._store.check([_TOLD]), seconds)

    def _read(self, key: str) -> RankState | None:
        return RankState.decode(self._store.get(key)) if self._store.check([key]) else None


def _poll(is_done: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_done() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _beat(rank: int) -> str:
    return f"state of rank {rank}"


def _answer(rank: int) -> str:
    return f"answer of rank {rank}"
