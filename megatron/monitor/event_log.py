"""events.jsonl: what has happened to a run, in the order of the clock, one JSON object per line.

    time        UTC, ISO 8601
    event       start, resume, growth, rollback, save, non_finite, stop, end, error
    iteration   optimizer steps done by then
    text        in words
    ...         the same as values, by kind

metrics.jsonl holds the steps that count, and a resumed run drops what it takes anew. Here nothing is ever taken back.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron.config.redaction import redact_urls
from megatron.errors import DataError, os_errors_as
from megatron.io.appended_file import AppendedFile
from megatron.io.json_files import sound_lines
from megatron.monitor.metrics_writer import RunEvent

EVENTS_FILE = "events.jsonl"

_logger = logging.getLogger(__name__)


class EventLog:
    """Appends events to the log of the run in a folder.

    The run goes on where that is not possible: nothing that it needs later is kept here.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / EVENTS_FILE
        # Held open from the first event on, so that a removed file is made again with what it held.
        self._file: AppendedFile | None = None

    def note(self, event: RunEvent) -> None:
        """Adds a line."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "event": event.kind,
            "iteration": event.iteration,
            "text": redact_urls(event.text),
            **event.details,
        }
        try:
            if self._file is None:
                self._file = AppendedFile(self._path)
            self._file.append(json.dumps(line, allow_nan=False))
        except OSError as error:
            why = error.strerror or error
            _logger.warning("%s: cannot be written (%s), so the run goes on without: %s", self._path, why, line["text"])


def read_events(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Reads what can be read of an event log, and a sentence for each damaged line.

    Raises DataError when it cannot be read at all.
    """
    with os_errors_as(DataError, str(path)):
        return sound_lines(path, _is_event, "no event of a run")


def _is_event(value: object) -> bool:
    if not isinstance(value, dict) or type(value.get("iteration")) is not int:
        return False
    if not all(isinstance(value.get(key), str) for key in ("time", "event", "text")):
        return False
    try:
        return datetime.fromisoformat(value["time"]).tzinfo is not None
    except ValueError:
        return False
