"""Measures how long a rank waits in collectives: on the host, or on its GPU, where operations are only queued."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch


class WaitingTime(Protocol):
    """Adds up the time between pairs of `begin` and `end`."""

    def begin(self) -> Any:
        """Returns a mark of the present moment."""
        ...

    def end(self, mark: Any) -> None:
        """Adds the time since a mark."""
        ...

    def seconds(self) -> float:
        """Returns the time so far [s]."""
        ...


class HostWaitingTime:
    """Time that the process spends."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def begin(self) -> float:
        """Returns the time of the clock [s]."""
        return time.perf_counter()

    def end(self, mark: float) -> None:
        """Adds the time since a mark."""
        self._seconds += time.perf_counter() - mark

    def seconds(self) -> float:
        """Returns the time so far [s]."""
        return self._seconds


def timed_event() -> Any:
    """Returns a new CUDA event that knows its time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class DeviceWaitingTime:
    """Time that the current CUDA stream spends, by events before and after what is queued.

    The stream waits for a collective, and so for the slowest of its ranks, before it takes up what comes next.
    """

    def __init__(self, new_event: Callable[[], Any] = timed_event) -> None:
        self._new_event = new_event
        self._seconds = 0.0
        self._pending: deque[tuple[Any, Any]] = deque()
        self._free: list[Any] = []

    def begin(self) -> Any:
        """Records an event."""
        event = self._free.pop() if self._free else self._new_event()
        event.record()
        return event

    def end(self, mark: Any) -> None:
        """Records a second event, whose distance from `mark` counts once the device has come to it."""
        self._pending.append((mark, self.begin()))

    def seconds(self) -> float:
        """Returns the time so far [s], without what the device has still to do. Does not wait for it."""
        while self._pending and self._pending[0][1].query():
            first, last = self._pending.popleft()
            self._seconds += first.elapsed_time(last) / 1000.0
            self._free += [first, last]
        return self._seconds


def waiting_time() -> WaitingTime:
    """Returns the measure for this rank's device."""
    return DeviceWaitingTime() if torch.cuda.is_available() else HostWaitingTime()
