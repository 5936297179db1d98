"""The writers that metrics go to, by name. Each is one module in `writers/`, which registers what builds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron.config.sections.monitor import MonitorConfig
from megatron.registry import Registry


class BackendLostError(Exception):
    """A writer can take no more metrics, and the run can do without it."""


@dataclass(frozen=True)
class RunEvent:
    """Something that happened to a run between two steps, to be marked on its curves."""

    iteration: int
    """Optimizer steps before it [steps]."""

    kind: str
    """Name of its kind, such as `growth`."""

    text: str
    """What happened, in words."""

    details: Mapping[str, object]
    """The same as values of JSON."""


class MetricsWriter(Protocol):
    """Shows or keeps the metrics of a step, and events."""

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of step `iteration`; keys as in metrics_file.py. Raises BackendLostError."""

    def mark(self, event: RunEvent) -> None:
        """Takes an event. A run that goes on from its step marks it once more. Raises BackendLostError."""

    def close(self) -> None:
        """Writes out what is held back and closes files and connections. Raises BackendLostError."""


@dataclass(frozen=True)
class MonitoredRun:
    """Facts of the run that its writers need."""

    folder: Path
    """The run's folder; metrics.jsonl lies here."""

    name: str | None
    """Name in dashboards that show several runs."""

    total_iterations: int
    """Length of the run [steps]."""

    resume_iteration: int
    """Step that the run goes on from; 0 for a new run."""

    config_dump: Mapping[str, object]
    """The configuration as nested mappings of scalars and lists."""


WRITERS: Registry[Callable[[MonitorConfig, MonitoredRun], MetricsWriter | None]] = Registry(
    "metrics writer", package="megatron.monitor.writers"
)
"""Each builds its writer, or returns None where the configuration does not ask for it."""


@contextmanager
def lost_on(backend: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Raises BackendLostError for each of `errors`, so that the monitor need not know every backend's own."""
    try:
        yield
    except errors as error:
        raise BackendLostError(f"{backend}: {type(error).__name__}: {error}") from error
