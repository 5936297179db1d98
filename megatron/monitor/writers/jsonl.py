"""Writes metrics.jsonl (metrics_file.py), which every run has."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from megatron.config.sections.monitor import MonitorConfig
from megatron.errors import EnvironmentSetupError, os_errors_as
from megatron.io.appended_file import AppendedFile
from megatron.io.durable import replace_durably
from megatron.monitor.metrics_file import METRICS_FILE, read_lines
from megatron.monitor.metrics_writer import WRITERS, MonitoredRun, RunEvent


class JsonlWriter:
    """Appends a line per record to an AppendedFile.

    Never lost silently: where a line cannot be written (a full disk), an EnvironmentSetupError ends the run.
    """

    def __init__(self, path: Path) -> None:
        """Opens `path` to append to it, and creates it and its folder.

        Raises EnvironmentSetupError where that is not possible.
        """
        try:
            self._file = AppendedFile(path)
        except OSError as error:
            raise EnvironmentSetupError(
                f"{path}: the run's metrics cannot be written here ({error.strerror}). Set log_dir to another folder."
            ) from error

    @classmethod
    def start(cls, path: Path) -> JsonlWriter:
        """Begins a new record; an earlier run's file is kept as metrics.1.jsonl, metrics.2.jsonl and so on."""
        if os.path.lexists(path):
            number = 1
            while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
                number += 1
            path.rename(kept)
        return cls(path)

    @classmethod
    def resume(cls, path: Path, iteration: int) -> JsonlWriter:
        """Continues after step `iteration`: what the resumed run writes again is dropped, atomically.

        That are later rows, and events of that step itself. Raises DataError where `path` is not a metrics file.
        """
        if path.exists():
            kept = [
                line for line, record in read_lines(path) if record["iteration"] < iteration + ("event" not in record)
            ]
            replace_durably(path, "".join(f"{line}\n" for line in kept))
        return cls(path)

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        record = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        with os_errors_as(EnvironmentSetupError, str(self._file.path)):
            self._file.append(json.dumps({"iteration": iteration, **record}, allow_nan=False))

    def mark(self, event: RunEvent) -> None:
        record = {"iteration": event.iteration, "event": event.kind, "text": event.text, **event.details}
        with os_errors_as(EnvironmentSetupError, str(self._file.path)):
            self._file.append(json.dumps(record, allow_nan=False))

    def close(self) -> None:
        self._file.close()


@WRITERS.register("jsonl")
def build_jsonl(config: MonitorConfig, run: MonitoredRun) -> JsonlWriter:
    """Builds the writer of the run's record, which a resumed run continues."""
    path = run.folder / METRICS_FILE
    return JsonlWriter.resume(path, run.resume_iteration) if run.resume_iteration else JsonlWriter.start(path)
