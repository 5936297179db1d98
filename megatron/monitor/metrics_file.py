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

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.errors import DataError, os_errors_as
from megatron.io.json_files import parse_json

METRICS_FILE = "metrics.jsonl"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a metrics file, in file order; the torn last line of a killed run is left out.

    Raises DataError, with the line's number, where a line is no record.
    """
    return [record for _, record in read_lines(path)]


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each line of a metrics file with its record; leaves out and raises what `read_records` does."""
    with os_errors_as(DataError, str(path)):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise _not_a_record(path, number, str(error)) from error
        if not isinstance(record, dict) or type(record.get("iteration")) is not int or record["iteration"] < 0:
            raise _not_a_record(path, number, "no object with a whole-number 'iteration'")
        yield line, record


def _not_a_record(path: Path, number: int, why: str) -> DataError:
    return DataError(
        f"{path}:{number}: {why}, so this is no metrics file of a run, or it is damaged. "
        "Remove the line, or move the file away."
    )
