"""The monitor: the one object that a training loop reports metrics to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType

from megatron.config.sections.monitor import MonitorConfig
from megatron.monitor.metrics_writer import WRITERS, BackendLostError, MetricsWriter, MonitoredRun, RunEvent

_logger = logging.getLogger(__name__)


class Monitor:
    """Hands every record to every writer. A writer that is lost is reported once and left out from then on."""

    def __init__(self, writers: Iterable[MetricsWriter] = ()) -> None:
        """Takes the writers; without any, as on every rank but the first, nothing is shown or kept."""
        self._writers = list(writers)

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of step `iteration`; keys as in metrics_file.py, one call per step."""
        self._each(lambda writer: writer.write(iteration, metrics))

    def mark(self, event: RunEvent) -> None:
        """Records an event."""
        self._each(lambda writer: writer.mark(event))

    def close(self) -> None:
        """Closes all writers."""
        self._each(lambda writer: writer.close())
        self._writers.clear()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _each(self, action: Callable[[MetricsWriter], None]) -> None:
        for writer in list(self._writers):
            try:
                action(writer)
            except BackendLostError as loss:
                _warn(loss)
                self._writers.remove(writer)


def build_monitor(
    config: MonitorConfig,
    run_dir: Path,
    *,
    rank: int,
    run_name: str | None,
    total_iterations: int,
    resume_iteration: int,
    config_dump: Mapping[str, object],
) -> Monitor:
    """Builds the monitor of a run that lives in `run_dir` and starts after step `resume_iteration` (0 for a new run).

    Global rank 0 writes metrics.jsonl and progress lines, and to the dashboards that the configuration asks for; other
    ranks get a monitor that does nothing. Raises EnvironmentSetupError where metrics.jsonl cannot be written or a
    dashboard's package or credentials are missing, DataError where an existing metrics.jsonl is damaged.
    """
    if rank != 0:
        return Monitor()
    run = MonitoredRun(run_dir, run_name, total_iterations, resume_iteration, config_dump)
    writers = []
    for name in WRITERS:
        try:
            writer = WRITERS[name](config, run)
        except BackendLostError as loss:
            _warn(loss)
            continue
        if writer is not None:
            writers.append(writer)
    return Monitor(writers)


def _warn(loss: BackendLostError) -> None:
    _logger.warning("%s. The run goes on without it; metrics.jsonl has everything.", loss)
