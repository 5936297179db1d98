"""Loss of training runs over the cost of everything that led to it, growth included."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, PositiveInt, ValidationError

from megatron.config.model_size import count_parameters
from megatron.config.section import Section
from megatron.config.sections.growth import ModelSizes
from megatron.config.sections.model import ModelConfig
from megatron.errors import DataError
from megatron.io.json_files import read_json_object
from megatron.monitor.metrics_file import METRICS_FILE, sound_records

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GrowthEvent:
    """A growth in a run's course."""

    step: float
    """Steps before it, counted from the first run's start [steps]."""
    tokens: float
    """Training tokens that were read before it [tokens]."""
    flops: float
    """Cost of everything before it [FLOP]."""
    factor: float
    """Parameters beside the embedding after it, over those before."""


@dataclass(frozen=True, eq=False)
class Series:
    """One metric of a run, where it was measured."""

    steps: Values
    tokens: Values
    """Training tokens read so far, those of smaller models included [tokens]."""
    flops: Values
    """Cost of all training so far, the smaller models' included [FLOP]."""
    values: Values

    def until(self, step: float) -> Series:
        """Returns the part that was measured up to `step`."""
        return self.where(self.steps <= step)

    def since(self, step: float) -> Series:
        """Returns the part that was measured after `step`."""
        return self.where(self.steps > step)

    def where(self, chosen: npt.NDArray[np.bool_]) -> Series:
        """Returns the part that is chosen."""
        return Series(self.steps[chosen], self.tokens[chosen], self.flops[chosen], self.values[chosen])


@dataclass(frozen=True, eq=False)
class LossCurve:
    """A run from its first initial weights on: the run itself, and the smaller ones that it has grown from."""

    name: str
    seed: int
    learning_rate: float
    """Peak of the schedule."""
    parameters: int
    """Of the model that it ends with, embedding included."""
    first_parameters: int
    """Of the model that it began with."""
    valid: Series
    """Validation loss [nat/token]."""
    train: Series
    """Training loss, a mean over the steps since the row before [nat/token]."""
    rates: Series
    """Learning rates."""
    growths: tuple[GrowthEvent, ...] = ()
    rules: Mapping[str, Any] = field(default_factory=dict)
    """Rules of the last growth."""

    @property
    def loss(self) -> float:
        """Returns the last validation loss [nat/token]."""
        return float(self.valid.values[-1])

    @property
    def flops(self) -> float:
        """Returns the cost of the whole [FLOP]."""
        return float(self.valid.flops[-1])

    @property
    def tokens(self) -> float:
        """Returns the training tokens of the whole [tokens]."""
        return float(self.valid.tokens[-1])


def read_curve(words: str) -> tuple[LossCurve, list[str]]:
    """Reads the run FOLDER, or FOLDER+FOLDER+… of which each has grown from the one before.

    Returns with the curve what was left out because it could not be read, a sentence for each line. Of a run from which
    the next one has branched off, what came later does not count. Raises DataError for a folder without a run, or a run
    without a validation loss.
    """
    runs = [_read_run(Path(name)) for name in words.split("+")]
    rows: list[_Row] = []
    events: list[GrowthEvent] = []
    for index, run in enumerate(runs):
        before = runs[index - 1] if index > 0 else None
        if before is not None:
            rows = [row for row in rows if run.restarts or row.own_step <= run.start]
            if not rows:
                raise DataError(f"{run.folder} does not go on from {before.folder}: its steps begin before.")
        last = rows[-1] if rows else None
        own = run.growths(last)
        if before is not None and last is not None and not own and before.inner_parameters != run.inner_parameters:
            factor = run.inner_parameters / before.inner_parameters
            own = [GrowthEvent(last.step, last.tokens, last.flops, factor)]
        events += own
        rows += run.rows(last)
    first, last_run = runs[0], runs[-1]
    curve = LossCurve(
        name=words,
        seed=int(last_run.training["seed"]),
        learning_rate=float(last_run.training["optimizer"]["lr"]),
        parameters=last_run.last_parameters,
        first_parameters=first.first_parameters,
        valid=_series(rows, "valid/lm_loss"),
        train=_series(rows, "train/lm_loss"),
        rates=_series(rows, "train/learning_rate"),
        growths=tuple(events),
        rules=last_run.rules,
    )
    if len(curve.valid.values) == 0:
        raise DataError(f"{words}: no validation loss. A report needs runs with validation data and eval_iters.")
    return curve, [line for run in runs for line in run.damaged]


@dataclass(frozen=True)
class _Row:
    """A row of metrics.jsonl with what led to it."""

    own_step: int
    """As the run counts it."""
    step: float
    """Counted from the first run's start."""
    tokens: float
    flops: float
    record: Mapping[str, Any]


class _GrowthRow(Section):
    """The row of a growth in metrics.jsonl; which other keys it has does not matter."""

    model_config = ConfigDict(extra="ignore")

    iteration: int
    before: ModelSizes
    after: ModelSizes
    parameters_before: PositiveInt
    parameters_after: PositiveInt
    training_flops: float | None = None


@dataclass(frozen=True)
class _Run:
    """One run's folder, as far as it can be read."""

    folder: Path
    records: Sequence[Mapping[str, Any]]
    events: Sequence[_GrowthRow]
    """Its growths, in its course and where it has loaded a smaller model."""
    damaged: Sequence[str]
    parameters: int
    model: ModelConfig
    flops_per_token: float
    tokens_per_step: int
    training: Mapping[str, Any]
    restarts: bool
    """Whether it took weights alone, and counts its steps from 0."""
    rules: Mapping[str, Any]

    @property
    def inner_parameters(self) -> int:
        """Counts the parameters beside the embedding."""
        return count_parameters(self.model, 0)

    @property
    def first_parameters(self) -> int:
        """Returns the parameters that it or what it has loaded began with."""
        return self.events[0].parameters_before if self.events else self.parameters

    @property
    def last_parameters(self) -> int:
        """Returns the parameters that it ends with."""
        return self.events[-1].parameters_after if self.events else self.parameters

    @property
    def start(self) -> int:
        """Returns a step that is not before its start, and before all that it has recorded."""
        first = int(self.records[0]["iteration"])
        grown = [event.iteration for event in self.events if event.iteration < first]
        return grown[0] if grown else first - 1

    def rows(self, before: _Row | None) -> list[_Row]:
        """Returns its rows with the costs of what was there before it."""
        return [self._row(record, before) for record in self.records]

    def growths(self, before: _Row | None) -> list[GrowthEvent]:
        """Returns its growths with the costs of what was there before them."""
        found = []
        for event in self.events:
            row = self._row(event.model_dump(), before)
            models = [sizes.in_model(self.model) for sizes in (event.before, event.after)]
            small, large = (count_parameters(model, 0) for model in models)
            found.append(GrowthEvent(row.step, row.tokens, row.flops, large / small))
        return found

    def _row(self, record: Mapping[str, Any], before: _Row | None) -> _Row:
        step = int(record["iteration"])
        offset = before.step if before is not None and self.restarts else 0
        own = before.own_step if before is not None and not self.restarts else 0
        tokens, flops = (before.tokens, before.flops) if before is not None else (0.0, 0.0)
        read = (step - own) * self.tokens_per_step
        flops += read * self.flops_per_token
        counted = record.get("training_flops")
        # What a run counts itself goes on over resumes and growth; a run that takes weights alone begins anew.
        if counted is not None and (not self.restarts or before is None or self.events):
            flops = float(counted)
        return _Row(step, offset + step, tokens + read, flops, record)


def _read_run(folder: Path) -> _Run:
    file, described = folder / METRICS_FILE, folder / "run.json"
    for path in (file, described):
        if not path.is_file():
            raise DataError(f"{path}: no such file. Give a run's folder: its log_dir, or else its save.")
    rows, damaged = sound_records(file)
    records = [row for row in rows if "event" not in row]
    if not records:
        raise DataError(f"{file}: no rows that can be read.")
    growths = [_growth(file, row) for row in rows if row.get("event") == "growth"]
    try:
        description = read_json_object(described)
        config = description["config"]
        model = ModelConfig.model_validate_json(json.dumps(config["model"]))
        return _Run(
            folder=folder,
            records=records,
            events=growths,
            damaged=damaged,
            parameters=description["parameters"],
            model=model,
            flops_per_token=description["flops_per_token"],
            tokens_per_step=description["tokens_per_step"],
            training=config["training"],
            restarts=bool(config["checkpoint"]["finetune"])
            or config["checkpoint"]["pretrain_partial_init"] is not None,
            rules=config.get("grow") or {},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{described}: damaged, or written by another version ({error}).") from error


def _growth(file: Path, row: Mapping[str, Any]) -> _GrowthRow:
    try:
        return _GrowthRow.model_validate(row)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(str(part) for part in wrong["loc"])
        # Without it, what the run has cost and how large its model is would be wrong.
        raise DataError(
            f"{file}: the growth of iteration {row['iteration']} is damaged ({key}: {wrong['msg']}), and without it "
            "the cost of the run is unknown. Repair the line, or leave this run out."
        ) from error


def _series(rows: Sequence[_Row], metric: str) -> Series:
    measured = [row for row in rows if _is_measured(row.record, metric)]
    columns = [[row.step, row.tokens, row.flops, _value(row.record[metric])] for row in measured]
    steps, tokens, flops, values = np.array(columns, dtype=np.float64).reshape(-1, 4).T
    return Series(steps, tokens, flops, values)


def _is_measured(record: Mapping[str, Any], metric: str) -> bool:
    value = record.get(metric, "")
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _value(value: float | None) -> float:
    """Returns a value of metrics.jsonl; infinity for the null of one that was not finite: no loss is worse."""
    return math.inf if value is None or not math.isfinite(value) else float(value)
