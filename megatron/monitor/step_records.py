"""Files of JSON lines about the steps of a run, which a resumed run continues."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.errors import EnvironmentSetupError, os_errors_as
from megatron.io.appended_file import AppendedFile
from megatron.io.durable import replace_durably
from megatron.monitor.metrics_file import read_records


class StepRecords:
    """Appends records, each with its `iteration`, to a file that holds those up to the step a run starts from."""

    def __init__(self, path: Path, iteration: int) -> None:
        """Opens the file after step `iteration`, and drops what will be written again, atomically.

        Raises DataError where the file is damaged, EnvironmentSetupError where it cannot be written.
        """
        self._path = path
        done = read_records(path) if iteration and path.exists() else []
        lines = [json.dumps(record) for record in done if record["iteration"] <= iteration]
        with os_errors_as(EnvironmentSetupError, str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_durably(path, "".join(f"{line}\n" for line in lines))
            self._file = AppendedFile(path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a record. Raises EnvironmentSetupError where it cannot be written."""
        with os_errors_as(EnvironmentSetupError, str(self._path)):
            self._file.append(json.dumps(record))
