"""Writes to TensorBoard, which is imported only when asked for and which a run survives losing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from megatron.config.sections.monitor import MonitorConfig
from megatron.monitor.metrics_writer import WRITERS, MonitoredRun, RunEvent, lost_on
from megatron.registry import install_extra, require


class TensorBoardWriter:
    """Writes a scalar per metric over the iteration, and events as text."""

    def __init__(self, folder: Path, resume_iteration: int) -> None:
        """Opens an event file in `folder`; what earlier event files say beyond `resume_iteration` is hidden.

        Raises EnvironmentSetupError where the package is missing, BackendLostError where the folder cannot be written.
        """
        require("tensorboard", "tensorboard_dir", install_extra("monitor"))
        summary = require("torch.utils.tensorboard", "tensorboard_dir", install_extra("monitor"))
        with self._guarded():
            self._writer = summary.SummaryWriter(log_dir=str(folder), purge_step=resume_iteration + 1)

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        with self._guarded():
            for key, value in metrics.items():
                self._writer.add_scalar(key, value, iteration)
            self._writer.flush()

    def mark(self, event: RunEvent) -> None:
        with self._guarded():
            self._writer.add_text(event.kind, event.text, event.iteration)
            self._writer.flush()

    def close(self) -> None:
        with self._guarded():
            self._writer.close()

    def _guarded(self) -> AbstractContextManager[None]:
        return lost_on("TensorBoard", (OSError,))


@WRITERS.register("tensorboard")
def build_tensorboard(config: MonitorConfig, run: MonitoredRun) -> TensorBoardWriter | None:
    """Builds the writer of `tensorboard_dir`, in a folder per run: TensorBoard draws those of one as one curve."""
    if config.tensorboard_dir is None:
        return None
    return TensorBoardWriter(Path(config.tensorboard_dir) / (run.name or run.folder.name), run.resume_iteration)
