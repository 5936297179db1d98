"""metrics.jsonl: the record that every run leaves, one JSON object per line and logged step.

Keys: `iteration` (the optimizer step, from 1), `consumed_tokens`, and one key per measurement, `<split>/<name>`:

    train/lm_loss            valid/lm_loss    test/lm_loss         mean next-token loss [nat]
                             valid/perplexity test/perplexity      exp(lm_loss)
    train/loss, train/distillation_loss                            the whole loss of a distilled run, and its other term
    train/learning_rate, train/grad_norm (before clipping), train/skipped_steps (so far)
    train/tokens_per_second, train/step_seconds, train/seconds_left (estimate)
    train/mfu, train/data_wait_share [0..1]
    train/save_wait_seconds, train/evaluation_seconds, train/sampling_seconds    time since the last row that went into
                             saves, evaluations and samples [s]; only where there were some
    train/memory_gib         peak of this rank [GiB]
    train/rank_seconds_min, _median, _max, train/slowest_rank      time of a step that a rank does not spend waiting for
                             others [s], over the ranks; only where there are several
    training_flops           of all training so far, over resumes and growth, a teacher's passes included [FLOP]

A row with the key `event` marks what happened between two steps, after `iteration` of them, with `text` in words.
`event: growth` has `operator`, `before` and `after` (sizes), `parameters_before`, `parameters_after`, `consumed_tokens`
and `training_flops`.

JSON has no NaN or infinity: they are written as null, so that any JSON reader can read the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.errors import DataError, os_errors_as
from megatron.io.json_files import parse_json, sound_lines

METRICS_FILE = "metrics.jsonl"
NO_RECORD = "no object with a whole-number 'iteration'"


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
        if not _is_record(record):
            raise _not_a_record(path, number, NO_RECORD)
        yield line, record


def sound_records(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Reads what can be read of a metrics file: the rows by rising iteration, and a sentence for each damaged line.

    Where an iteration has several rows, as after a crash, they are one, in which the last value counts. Events stand
    after the row of their iteration. Raises DataError when the file cannot be read at all.
    """
    with os_errors_as(DataError, str(path)):
        found, damaged = sound_lines(path, _is_record, NO_RECORD)
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for row in found:
        place = (row["iteration"], str(row.get("event", "")))
        rows[place] = rows.get(place, {}) | row
    return [rows[place] for place in sorted(rows)], damaged


def _is_record(value: object) -> bool:
    return isinstance(value, dict) and type(value.get("iteration")) is int and value["iteration"] >= 0


def _not_a_record(path: Path, number: int, why: str) -> DataError:
    return DataError(
        f"{path}:{number}: {why}, so this is no metrics file of a run, or it is damaged. "
        "Remove the line, or move the file away."
    )
