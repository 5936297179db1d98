"""metrics.jsonl: the record that every run leaves, one JSON object per line and logged step.

Keys: `iteration` (the optimizer step, from 1), `consumed_tokens`, and one key per measurement, `<split>/<name>`:

    train/lm_loss            valid/lm_loss    test/lm_loss         mean next-token loss [nat]
                             valid/perplexity test/perplexity      exp(lm_loss)
    train/learning_rate, train/grad_norm (before clipping), train/skipped_steps (so far)
    train/tokens_per_second, train/step_seconds, train/seconds_left (estimate)
    train/mfu, train/data_wait_share [0..1]
    train/memory_gib         peak of this rank [GiB]

JSON has no NaN or infinity: they are written as null, so that any JSON reader can read the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.errors import DataError, EnvironmentSetupError
from megatron.io.durable import replace_durably

METRICS_FILE = "metrics.jsonl"


class JsonlWriter:
    """Appends a line per record and hands it to the operating system at once, so that a killed run loses none.

    Never lost silently: where a line cannot be written (a full disk), the OSError ends the run.
    """

    def __init__(self, path: Path) -> None:
        """Append to `path`, creating it and its folder. Raises EnvironmentSetupError where that is not possible."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise EnvironmentSetupError(
                f"{path}: the run's metrics cannot be written here ({error.strerror}). Set log_dir to another folder."
            ) from error

    @classmethod
    def start(cls, path: Path) -> JsonlWriter:
        """Begin a new record; an earlier run's file is kept as metrics.1.jsonl, metrics.2.jsonl and so on."""
        if path.exists():
            number = 1
            while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
                number += 1
            path.rename(kept)
        return cls(path)

    @classmethod
    def resume(cls, path: Path, iteration: int) -> JsonlWriter:
        """Go on after step `iteration`: later rows, which the resumed run makes again, are dropped atomically.

        Raises DataError where `path` is not a metrics file.
        """
        if path.exists():
            kept = [line for line, record in _parse_lines(path) if record["iteration"] <= iteration]
            replace_durably(path, "".join(f"{line}\n" for line in kept))
        return cls(path)

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        record = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"iteration": iteration, **record}, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, in file order; the torn last line of a killed run is left out.

    Raises DataError, with the line's number, where a line is no record.
    """
    return [record for _, record in _parse_lines(path)]


def _parse_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise _not_a_record(path, number, f"not JSON ({error.msg})") from error
        if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
            raise _not_a_record(path, number, "no object with a whole-number 'iteration'")
        yield line, record


def _not_a_record(path: Path, number: int, why: str) -> DataError:
    return DataError(
        f"{path}:{number}: {why}, so this is no metrics file of a run, or it is damaged. "
        "Remove the line, or move the file away."
    )
