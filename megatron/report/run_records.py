"""Reads the records of runs, as series to draw."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron.config.local_path import holds_paths
from megatron.config.sections.section_fields import fields
from megatron.config.yaml.problems import show
from megatron.errors import DataError
from megatron.io.json_files import describe_read_error, read_json_object
from megatron.monitor.metrics_file import METRICS_FILE, read_records
from megatron.report.foreign_values import is_number, one_line

SECTIONS_OF_NUMBERS = {"model", "training", "data", "parallel", "speedups"}
"""Sections whose values decide losses and speed."""
MOST_VALUES = 3
"""Values that a name has room for."""
AXES_IN_ROWS = ("consumed_tokens", "training_flops")
"""Places on a horizontal axis that rows hold beside their step."""


@dataclass(frozen=True)
class RunRecord:
    """The metrics and the description that one run has written."""

    name: str
    """That of its configuration; that of its folder where run.json does not tell."""
    file: Path
    """Its metrics.jsonl."""

    records: list[dict[str, Any]]
    """Rows of metrics.jsonl, by rising iteration."""

    parameters: int | None
    """Size of the model, from run.json; None where there is none."""

    flops_per_token: float | None
    """Forward and backward [FLOP], from run.json; None where there is none."""

    settings: dict[str, str] = field(default_factory=dict)
    """Values of its configuration as YAML would say them, by key, from run.json; none where there is none."""

    events: list[dict[str, Any]] = field(default_factory=list)
    """Rows that mark what happened between two steps, such as growth."""


def load_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Reads several runs; those that share a name get what tells them apart added to it: values, or else paths."""
    return tell_apart([load_run(path) for path in paths], paths)


def tell_apart(runs: Sequence[RunRecord], paths: Sequence[Path]) -> list[RunRecord]:
    """Returns runs read from `paths` by names that are all different."""
    times = Counter(run.name for run in runs)
    return [
        run if times[run.name] == 1 else replace(run, name=f"{run.name} ({_own_values(run, runs) or path})")
        for run, path in zip(runs, paths, strict=True)
    ]


def _own_values(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """Returns the values in which a run differs from those of its name; nothing where they are none, or many."""
    namesakes = [other.settings for other in runs if other.name == run.name]
    keys = [key for key in run.settings if len({settings.get(key) for settings in namesakes}) > 1]
    own = [tuple(settings.get(key) for key in keys) for settings in namesakes]
    if len(keys) > MOST_VALUES or len(set(own)) < len(namesakes):
        return ""
    return ", ".join(f"{key.rpartition('.')[2]}={run.settings[key]}" for key in keys)


def settings_of(config: object) -> dict[str, str]:
    """Returns the values of a recorded configuration by key, without those of its place and its progress."""
    found = {}
    for path, known in fields().items():
        value: Any = config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if path.partition(".")[0] in SECTIONS_OF_NUMBERS and not holds_paths(known.schema):
            found[known.key] = one_line(show(value))
    return found


def load_run(path: Path) -> RunRecord:
    """Reads a run from its folder or metrics.jsonl. Raises DataError where there is none, or no rows in it."""
    file = path / METRICS_FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{path}: no {METRICS_FILE} here. Give a run's folder (log_dir, or save) or the file itself.")
    rows = sorted(read_records(file), key=lambda record: record["iteration"])
    records, events = [row for row in rows if "event" not in row], [row for row in rows if "event" in row]
    _require_numbers(file, records)
    _require_growths(file, events)
    if not records:
        raise DataError(f"{file}: no rows yet. The first one comes after log_interval steps.")
    records = placed(records)
    described = file.with_name("run.json")
    description = _read_description(described)
    for key in ("parameters", "flops_per_token"):
        value = description.get(key)
        if value is not None and not is_number(value):
            raise DataError(f"{described}: {key} is {value!r:.50}, no number. Remove the file if it is not yours.")
    return RunRecord(
        run_name(description, file),
        file,
        records,
        description.get("parameters"),
        description.get("flops_per_token"),
        settings_of(description.get("config")),
        events,
    )


def placed(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns rows with their places on the axes.

    An evaluation may have a row of its own, whose place stands in the training row of the same step.
    """
    found = list(records)
    for axis in AXES_IN_ROWS:
        places = {record["iteration"]: record[axis] for record in found if axis in record}
        found = [
            {axis: places[record["iteration"]]} | record if record["iteration"] in places else record
            for record in found
        ]
    return found


def run_name(description: Mapping[str, Any], file: Path) -> str:
    """Returns what a run is called, from its run.json, or else that of the folder of its metrics `file`."""
    called = description.get("configuration") or description.get("name") or file.resolve().parent.name
    return one_line(str(called))


def _require_numbers(file: Path, records: Sequence[dict[str, Any]]) -> None:
    """Raises DataError where a value is neither a number nor the null of one that was not finite."""
    for record in records:
        for key, value in record.items():
            if value is not None and not is_number(value):
                raise DataError(
                    f"{file}: {key!r} of iteration {record['iteration']} is {value!r:.50}, no number, so this is no "
                    "metrics file of a run, or it is damaged."
                )


def _require_growths(file: Path, events: Sequence[dict[str, Any]]) -> None:
    """Raises DataError where an event is not the growth of a run."""
    numbers = (*AXES_IN_ROWS, "parameters_before", "parameters_after")
    for event in events:
        if event["event"] != "growth" or not all(is_number(event.get(key)) for key in numbers):
            raise DataError(
                f"{file}: the event of iteration {event['iteration']} is no growth of a run: {event['event']!r:.50}. "
                "Remove the line, or move the file away."
            )


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: {describe_read_error(error)}. Training writes this file; remove it if it is not yours."
        ) from error


def positions(run: RunRecord, records: Sequence[dict[str, Any]], x: str) -> np.ndarray:
    """Returns the positions of `records` on the horizontal axis `x`: steps, tokens or flops.

    Raises DataError when the run did not record what they follow from.
    """
    if x == "steps":
        return np.array([record["iteration"] for record in records], dtype=float)
    if x == "flops" and all("training_flops" in record for record in records):
        return np.array([record["training_flops"] for record in records], dtype=float)
    if any("consumed_tokens" not in record for record in records):
        raise DataError(f"{run.file}: rows without consumed_tokens, so nothing to draw over {x}. Use --x steps.")
    tokens = np.array([record["consumed_tokens"] for record in records], dtype=float)
    if x == "tokens":
        return tokens
    if not run.flops_per_token:
        raise DataError(f"{run.file}: no flops_per_token in run.json beside it, which --x flops needs.")
    return tokens * run.flops_per_token


def series(run: RunRecord, metric: str, x: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions and values of `metric` where it was measured; NaN where the value was not finite."""
    records = [record for record in run.records if metric in record]
    values = [math.nan if record[metric] is None else record[metric] for record in records]
    return positions(run, records, x), np.array(values, dtype=float)
