"""Where metrics go: the writers by name, and the monitor, the one object that a training loop reports to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from megatron.config.sections.monitor import MonitorConfig
from megatron.monitor.writers.console import ConsoleWriter
from megatron.monitor.writers.dashboards import TensorBoardWriter, WandbWriter
from megatron.monitor.writers.jsonl import METRICS_FILE, JsonlWriter
from megatron.monitor.writers.metrics_writer import BackendLostError, MetricsWriter
from megatron.registry import Registry

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MonitoredRun:
    """What the writers know of the run."""

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


# Each builds the writer, or returns None where the configuration does not ask for it.
WRITERS: Registry[Callable[[MonitorConfig, MonitoredRun], MetricsWriter | None]] = Registry("metrics writer")


@WRITERS.register("jsonl")
def _jsonl(config: MonitorConfig, run: MonitoredRun) -> MetricsWriter:
    path = run.folder / METRICS_FILE
    return JsonlWriter.resume(path, run.resume_iteration) if run.resume_iteration else JsonlWriter.start(path)


@WRITERS.register("console")
def _console(config: MonitorConfig, run: MonitoredRun) -> MetricsWriter:
    return ConsoleWriter(run.total_iterations)


@WRITERS.register("tensorboard")
def _tensorboard(config: MonitorConfig, run: MonitoredRun) -> MetricsWriter | None:
    if config.tensorboard_dir is None:
        return None
    # A folder per run: TensorBoard draws the files of one folder as one curve.
    return TensorBoardWriter(Path(config.tensorboard_dir) / (run.name or run.folder.name), run.resume_iteration)


@WRITERS.register("wandb")
def _wandb(config: MonitorConfig, run: MonitoredRun) -> MetricsWriter | None:
    if not config.wandb.enabled:
        return None
    return WandbWriter(
        config.wandb,
        run.folder,
        run_name=config.wandb.run_name or run.name,
        resume_iteration=run.resume_iteration,
        config_dump=run.config_dump,
    )


class Monitor:
    """Hands every record to every writer. A writer that is lost is reported once and left out from then on."""

    def __init__(self, writers: Iterable[MetricsWriter] = ()) -> None:
        """Without writers, as on every rank but the first, nothing is shown or kept."""
        self._writers = list(writers)

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Record what was measured at step `iteration`; keys as in writers/jsonl.py, one call per step."""
        self._each(lambda writer: writer.write(iteration, metrics))

    def close(self) -> None:
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
    """The monitor of a run that lives in `run_dir` and starts after step `resume_iteration` (0 for a new run).

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
