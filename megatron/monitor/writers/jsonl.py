"""Writes metrics.jsonl (metrics_file.py), which every run has."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from megatron.config.sections.monitor import MonitorConfig
from megatron.errors import EnvironmentSetupError
from megatron.io.durable import replace_durably
from megatron.monitor.metrics_file import METRICS_FILE, read_lines
from megatron.monitor.metrics_writer import WRITERS, MonitoredRun, RunEvent


class JsonlWriter:
    """Appends a line per record and hands it to the operating system at once, so that a killed run loses none.

    Never lost silently: where a line cannot be written (a full disk), the OSError ends the run.
    """

    def __init__(self, path: Path) -> None:
        """Opens `path` to append to it, and creates it and its folder.

        Raises EnvironmentSetupError where that is not possible.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise EnvironmentSetupError(
                f"{path}: the run's metrics cannot be written here ({error.strerror}). Set log_dir to another folder."
            ) from error

    @classmethod
    def start(cls, path: Path) -> JsonlWriter:
        """Begins a new record; an earlier run's file is kept as metrics.1.jsonl, metrics.2.jsonl and so on."""
        if path.exists():
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
        self._file.write(json.dumps({"iteration": iteration, **record}, allow_nan=False) + "\n")

    def mark(self, event: RunEvent) -> None:
        record = {"iteration": event.iteration, "event": event.kind, "text": event.text, **event.details}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


@WRITERS.register("jsonl")
def build_jsonl(config: MonitorConfig, run: MonitoredRun) -> JsonlWriter:
    """Builds the writer of the run's record, which a resumed run continues."""
    path = run.folder / METRICS_FILE
    return JsonlWriter.resume(path, run.resume_iteration) if run.resume_iteration else JsonlWriter.start(path)
