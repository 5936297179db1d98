"""What a monitor asks of a place that metrics go to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol


class BackendLostError(Exception):
    """A place that metrics go to can take no more of them, and the run can do without it."""


class MetricsWriter(Protocol):
    """Takes the metrics of a step and shows or keeps them."""

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Take what was measured at step `iteration`; keys as in jsonl.py. Raises BackendLostError."""
        ...

    def close(self) -> None:
        """Write out what is held back and let go of files and connections. Raises BackendLostError."""
        ...


@contextmanager
def lost_on(backend: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn each of `errors` into BackendLostError, so that the monitor need not know every backend's own."""
    try:
        yield
    except errors as error:
        raise BackendLostError(f"{backend}: {type(error).__name__}: {error}") from error
