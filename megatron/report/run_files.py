"""Reads all that a run has left in its folder: what is damaged is left out and named, and the rest is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from megatron.checkpointing.store.manifest import MANIFEST_FILE, damage, read_manifest
from megatron.config.redaction import redact, redact_urls
from megatron.config.run_yaml import RUN_YAML
from megatron.config.yaml.yaml_files import dump_yaml, read_yaml
from megatron.errors import CheckpointError, DataError
from megatron.io.json_files import describe_read_error, read_json_object, sound_lines
from megatron.monitor.evaluation_metrics import metrics_of
from megatron.monitor.event_log import EVENTS_FILE, read_events
from megatron.monitor.metrics_file import METRICS_FILE, sound_records
from megatron.report.foreign_values import is_number, one_line
from megatron.report.run_records import AXES_IN_ROWS, RunRecord, placed, run_name, settings_of, tell_apart

RUN_FILE = "run.json"
SAMPLES_FILE = "samples.jsonl"
CHECKPOINTS = "global_step*"
MOST_PROBLEMS = 20
"""Damaged lines of one file that are named one by one."""
MOST_BYTES = 64 * 2**20
"""Size of a file of results that is read [bytes]."""

T = TypeVar("T")


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on disk, as its manifest describes it."""

    name: str
    iteration: int
    size: int
    """Of all files together [bytes]."""
    num_files: int
    layout: str
    """Ranks that wrote it."""
    damage: tuple[str, ...]
    """What its files lack, by their sizes."""


@dataclass(frozen=True)
class Scores:
    """Scores of one checkpoint of the run, from a file of eval.py."""

    iteration: int
    date: str
    settings: str
    metrics: Mapping[tuple[str, str], tuple[float, float | None]]
    """(task, metric) -> (value, its standard error)."""


@dataclass(frozen=True)
class RunFiles:
    """A run as its folder tells it."""

    folder: Path
    record: RunRecord
    """Its curves, and its growths; without rows where it has not written any yet."""
    description: Mapping[str, Any]
    """run.json, without secrets; empty where it cannot be read."""
    configuration: str
    """YAML of what the run was given, without secrets; empty where the folder has none."""
    events: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    checkpoints: Sequence[SavedCheckpoint]
    scores: Sequence[Scores]
    problems: Sequence[str]
    """A sentence for each thing that could not be read."""

    @property
    def name(self) -> str:
        """Returns what the run is called in figures and tables."""
        return self.record.name

    def fact(self, *path: str) -> Any:
        """Returns a value of run.json; None where there is none."""
        value: Any = self.description
        for part in path:
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def last(self, metric: str) -> float | None:
        """Returns the last finite value of a metric; None where there is none."""
        values = (row.get(metric) for row in reversed(self.record.records))
        return next((value for value in values if is_number(value) and value == value), None)  # noqa: PLR0124 - NaN


def read_runs(folders: Sequence[Path], results: Sequence[Path] = ()) -> list[RunFiles]:
    """Reads runs from their folders, and their scores from files of eval.py, or folders of them.

    Runs that share a name get what tells them apart added to it. Raises DataError for a folder that no run has written.
    """
    runs = [_read_run(folder, results) for folder in folders]
    records = tell_apart([run.record for run in runs], folders)
    return [replace(run, record=record) for run, record in zip(runs, records, strict=True)]


def changed_at(folders: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """Returns size and time of the files that a report shows, of runs and of results, to tell whether one changes."""
    found = {}
    for folder in folders:
        names = [folder / name for name in (METRICS_FILE, RUN_FILE, RUN_YAML, EVENTS_FILE, SAMPLES_FILE)]
        for path in [folder, *names, *folder.glob(f"{CHECKPOINTS}/{MANIFEST_FILE}"), *folder.glob("*.json")]:
            try:
                state = path.stat()
            except OSError:
                continue
            found[path] = (state.st_size, state.st_mtime_ns)
    return found


def _read_run(folder: Path, results: Sequence[Path]) -> RunFiles:
    files = (METRICS_FILE, RUN_FILE, RUN_YAML, EVENTS_FILE)
    if not folder.is_dir() or not any((folder / name).is_file() for name in files):
        raise DataError(
            f"{folder}: no run's folder: it has none of {', '.join(files)}. Give the folder that a run writes to "
            "(log_dir, or else save)."
        )
    read = _Reader()
    description = read.whole(folder / RUN_FILE, read_json_object) or {}
    description = {str(key): value for key, value in dict(redact(description)).items()}  # type: ignore[call-overload]
    record = _read_record(folder, description, read)
    saved = description.get("config", {}).get("checkpoint", {}) if isinstance(description.get("config"), dict) else {}
    elsewhere = saved.get("save") if isinstance(saved, dict) else None
    places = {folder.resolve(): folder}
    if isinstance(elsewhere, str) and not any(folder.glob(CHECKPOINTS)):
        places.setdefault(Path(elsewhere).resolve(), Path(elsewhere))
    checkpoints = [found for place in places.values() for found in _checkpoints(place, read)]
    identities = {identity for _, identity in checkpoints}
    return RunFiles(
        folder=folder,
        record=record,
        description=description,
        configuration=_configuration(folder, read),
        events=sorted(
            (event for event in read.lines(folder / EVENTS_FILE, read_events) if is_number(event["iteration"])),
            key=lambda event: datetime.fromisoformat(event["time"]),
        ),
        samples=read.lines(folder / SAMPLES_FILE, _read_samples),
        checkpoints=[checkpoint for checkpoint, _ in checkpoints],
        scores=_scores(results, identities, read),
        problems=tuple(read.problems),
    )


@dataclass
class _Reader:
    """Reads files, and collects what is wrong with them."""

    problems: list[str] = field(default_factory=list)

    def whole(self, path: Path, read: Callable[[Path], T]) -> T | None:
        """Reads a file that may be missing; None where it is, or cannot be read."""
        if not path.is_file():
            return None
        try:
            return read(path)
        except (OSError, ValueError) as error:
            self.problems.append(f"{path}: left out, {describe_read_error(error)}")
        return None

    def lines(self, path: Path, read: Callable[[Path], tuple[list[dict[str, Any]], list[str]]]) -> list[dict[str, Any]]:
        """Reads the sound lines of a file that may be missing."""
        if not path.is_file():
            return []
        try:
            sound, damaged = read(path)
        except (DataError, OSError) as error:
            self.problems.append(f"{error}")
            return []
        self.problems += damaged[:MOST_PROBLEMS]
        if len(damaged) > MOST_PROBLEMS:
            self.problems.append(f"{path}: and {len(damaged) - MOST_PROBLEMS:,} more damaged lines")
        return sound


def _read_record(folder: Path, description: dict[str, Any], read: _Reader) -> RunRecord:
    file = folder / METRICS_FILE
    rows = read.lines(file, sound_records)
    records, growths, foreign = [], [], 0
    for row in rows:
        if "event" in row:
            numbers = (*AXES_IN_ROWS, "parameters_before", "parameters_after")
            if row["event"] == "growth" and all(is_number(row.get(key)) for key in ("iteration", *numbers)):
                growths.append(row)
            else:
                read.problems.append(f"{file}: the event of iteration {row['iteration']} left out, no growth of a run")
            continue
        sound = {key: value for key, value in row.items() if value is None or is_number(value)}
        foreign += len(row) - len(sound)
        if "iteration" in sound:
            records.append(sound)
    if foreign:
        read.problems.append(f"{file}: {foreign:,} values left out that are no numbers")
    counts = {key: description.get(key) for key in ("parameters", "flops_per_token")}
    known = {key: value for key, value in counts.items() if is_number(value)}
    return RunRecord(
        run_name(description, file),
        file,
        placed(records),
        known.get("parameters"),
        known.get("flops_per_token"),
        settings_of(description.get("config")),
        growths,
    )


def _configuration(folder: Path, read: _Reader) -> str:
    path = folder / RUN_YAML
    if not path.is_file():
        return ""
    entries, problems = read_yaml(path)
    read.problems += [redact_urls(f"{problem}") for problem in problems[:MOST_PROBLEMS]]
    values = redact({key: given.plain() for key, given in entries.items()})
    return dump_yaml(dict(values)) if isinstance(values, dict) else ""


def _read_samples(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    return sound_lines(path, _is_sample, "no sample of a run")


def _is_sample(value: object) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("iteration")) is int
        and is_number(value["iteration"])
        and all(isinstance(value.get(key), str) for key in ("prompt", "text"))
    )


def _checkpoints(folder: Path, read: _Reader) -> Iterator[tuple[SavedCheckpoint, str]]:
    """Yields the checkpoints in a folder by rising step, each with the identity of the run that wrote it."""
    found = []
    for path in folder.glob(CHECKPOINTS):
        if path.is_symlink() or not path.is_dir():
            continue
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            read.problems.append(f"{path}: left out, {error}")
            continue
        layout = " x ".join(f"{name.split('_')[0]} {size}" for name, size in manifest.layout.items() if size > 1)
        size = sum(entry.size for entry in manifest.files.values())
        lacks = tuple(damage(path, manifest.files, "sizes"))
        saved = SavedCheckpoint(
            one_line(path.name), manifest.iteration, size, len(manifest.files), one_line(layout) or "1 rank", lacks
        )
        found.append((saved, manifest.run_id))
    yield from sorted(found, key=lambda each: each[0].iteration)


def _scores(places: Sequence[Path], identities: set[str], read: _Reader) -> list[Scores]:
    """Reads the scores of a run's checkpoints; of several of one checkpoint and task, the newest counts."""
    files = [file for place in places for file in (sorted(place.glob("*.json")) if place.is_dir() else [place])]
    found = []
    for file in files:
        record = read.whole(file, lambda path: read_json_object(path, MOST_BYTES))
        model = record.get("model") if record is not None else None
        if record is None or not isinstance(model, dict):
            continue
        identity = model.get("run_id")
        if not isinstance(identity, str) or identity not in identities:
            continue
        results, settings = record.get("results"), record.get("config")
        is_sound = isinstance(results, dict) and all(isinstance(entries, dict) for entries in results.values())
        if not is_sound or type(model.get("iteration")) is not int or not is_number(model["iteration"]):
            read.problems.append(f"{file}: left out, no results of eval.py")
            continue
        sound = {
            one_line(task): {key: value for key, value in entries.items() if is_number(value)}
            for task, entries in (results or {}).items()
        }
        metrics = {(task, one_line(metric)): value for (task, metric), value in metrics_of(sound).items()}
        limits = settings if isinstance(settings, dict) else {}
        words = [f"{limits['num_fewshot']}-shot"] if limits.get("num_fewshot") else []
        words += [f"first {limits['limit']} of each task"] if limits.get("limit") else []
        found.append(Scores(model["iteration"], str(record.get("date", "")), one_line(", ".join(words)), metrics))
    return sorted(found, key=lambda scores: (scores.iteration, scores.date))
