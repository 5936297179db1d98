"""Progress messages of long work, at most one in a while."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic


class PeriodicReport:
    """Calls `report` at most once every `seconds` [s]; the first time not before that long has passed.

    `report` is a logger's method or `print`: quick work says nothing, and long work does not flood the log.
    """

    def __init__(self, report: Callable[..., object], seconds: float = 5.0) -> None:
        self._report = report
        self._seconds = seconds
        self._last = monotonic()

    def __call__(self, *message: object) -> None:
        """Hands `message` to `report`, unless the last one is too recent."""
        now = monotonic()
        if now - self._last > self._seconds:
            self._last = now
            self._report(*message)
