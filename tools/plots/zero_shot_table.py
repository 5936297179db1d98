"""Joins results of eval.py with published rows into one table: Markdown, CSV and a figure.

    python tools/plots/zero_shot_table.py eval_results/*.json --output zero_shot

writes zero_shot.md, zero_shot.csv and zero_shot.png. A column is a task and its metric, `--columns task:metric ...`;
the default ones are those of the TokenFormer paper. Files about the same model make one row. Averages are
computed anew; where a source prints another one, a note says so.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from megatron_tokenformer import run_tool

from matplotlib.figure import Figure
from pydantic import Field, TypeAdapter

from megatron.config.local_path import local_path
from megatron.errors import ConfigError, DataError
from megatron.io.json_files import describe_read_error, read_json_object
from megatron.monitor.evaluation_metrics import metrics_of
from megatron.monitor.format_quantities import format_count
from megatron.report.foreign_values import LARGEST, is_number, label, one_line
from tools.command_line import tool_parser

PUBLISHED = Path(__file__).with_name("published_zero_shot.csv")
COLUMNS = (
    "lambada_openai:acc",
    "hellaswag:acc_norm",
    "piqa:acc",
    "arc_easy:acc",
    "arc_challenge:acc_norm",
    "winogrande:acc",
)
SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics that are shown in percent and averaged."""
AVERAGE = ("average", "printed")
"""Task and metric by which the published rows say what their source prints as the average."""
ROUNDING = 0.0501
"""Largest difference of a printed average from that of the printed figures [percent points]: one digit is printed."""
MISSING, MISPRINTED = "-", "†"
MEASURED_COLOUR, PUBLISHED_COLOUR = "#D55E00", "0.45"


@dataclass
class Row:
    """The row of one model."""

    model: str
    parameters: float
    published: bool
    values: dict[str, float] = field(default_factory=dict)
    """By column; shares in percent."""
    errors: dict[str, float] = field(default_factory=dict)
    """One standard error of some of them."""
    sources: dict[str, str] = field(default_factory=dict)
    """The table or file that each value is from."""
    printed_average: float | None = None
    """What the source prints as the average of COLUMNS."""

    def average(self, columns: Sequence[str]) -> float | None:
        """Averages the shares among `columns`; None when one is missing."""
        shares = [self.values.get(column) for column in columns if is_share(column)]
        known = [share for share in shares if share is not None]
        return math.fsum(known) / len(known) if known and len(known) == len(shares) else None

    def source(self, columns: Sequence[str]) -> str:
        """Names where the values of `columns` are from."""
        return ", ".join(dict.fromkeys(self.sources[column] for column in columns if column in self.sources))

    def is_misprinted(self, columns: Sequence[str]) -> bool:
        """Tells whether the average of `columns` differs from the printed one, where that is the average of these."""
        average = self.average(columns)
        if self.printed_average is None or average is None or set(columns) != set(COLUMNS):
            return False
        return abs(average - self.printed_average) > ROUNDING


@dataclass(frozen=True)
class _Model:
    """The part of a results file about the model; what else is there is left alone."""

    name: str
    parameters: Annotated[float, Field(ge=0, lt=LARGEST, allow_inf_nan=False)]
    manifest_sha256: str | None = None
    sha256: str | None = None
    hub_commit: str | None = None


@dataclass(frozen=True)
class _Settings:
    limit: int | float | None
    num_fewshot: int | None = None


@dataclass(frozen=True)
class _Record:
    results: dict[str, dict[str, Any]]
    date: str
    model: _Model
    config: _Settings


_RECORD = TypeAdapter(_Record)


def is_share(column: str) -> bool:
    """Tells whether the column's metric is a share of right answers."""
    return column.rpartition(":")[2] in SHARES


def read_published(path: Path) -> list[Row]:
    """Reads the published rows; a line of their file is one value, with its metric and its source.

    Raises DataError, with the line's number, for a file that is none of these.
    """
    rows: dict[str, Row] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            for entry in lines:
                name, value = one_line(entry["model"]), _measured(entry["value"])
                row = rows.setdefault(name, Row(name, _measured(entry["parameters"]), True))
                if (entry["task"], entry["metric"]) == AVERAGE:
                    row.printed_average = value
                    continue
                column = f"{entry['task']}:{entry['metric']}"
                row.values[column] = value
                row.sources[column] = one_line(entry["source"])
    except OSError as error:
        raise DataError(f"{path}: {describe_read_error(error)}. Name a CSV of published values.") from error
    # A column that is not there, a line that is too short, a word for a number, a byte that is no text.
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(
            f"{path}: no CSV of published values ({error!r} after {len(rows)} models). Its columns are model, "
            "parameters, task, metric, value and source."
        ) from error
    return list(rows.values())


def _measured(text: str) -> float:
    value = float(text)
    if not is_number(value) or math.isnan(value):
        raise ValueError(f"{text!r:.50} is no number that was measured")
    return value


def read_results(paths: Sequence[Path]) -> list[Row]:
    """Reads a row per model; of several measurements of one column, the newest. Raises DataError for other files."""
    rows: dict[tuple[Any, ...], Row] = {}
    for path, record in sorted(((path, _read(path)) for path in paths), key=lambda pair: pair[1].date):
        model = record.model
        name = one_line(model.name) + _reservations(record.config)
        digest = model.manifest_sha256 or model.sha256 or model.hub_commit
        row = rows.setdefault((name, digest), Row(name, model.parameters, False))
        for (task, metric), (value, error) in metrics_of(record.results).items():
            column = f"{task}:{metric}"
            scale = 100.0 if is_share(column) else 1.0
            row.values[column] = scale * value
            row.errors[column] = scale * (error or 0.0)
            row.sources[column] = path.name
    return list(rows.values())


def _read(path: Path) -> _Record:
    try:
        record = _RECORD.validate_python(read_json_object(path))
        foreign = [key for entries in record.results.values() for key, value in entries.items() if _is_foreign(value)]
        if foreign:
            raise ValueError(f"{foreign[0]!r:.50} has no number that was measured")
    except (OSError, ValueError) as error:
        reason = describe_read_error(error).replace("\n", " ")
        raise DataError(f"{path}: not a results file of eval.py ({reason}). Name its .json files.") from error
    return record


def _is_foreign(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not is_number(value)


def _reservations(how: _Settings) -> str:
    """Notes what keeps a measurement from being compared with the published ones."""
    notes = [f"first {how.limit} only"] if how.limit else []
    notes += [f"{how.num_fewshot}-shot"] if how.num_fewshot else []
    return f" ({', '.join(notes)})" if notes else ""


def join(results: Sequence[Row], published: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """Returns all rows with a value in any of the columns, by size. Raises DataError when no result has one."""
    if not any(column in row.values for row in results for column in columns):
        measured = sorted({column for row in results for column in row.values})
        raise DataError(
            f"no results file measured {', '.join(columns)}. Measured: {', '.join(measured) or 'nothing'}. Name some "
            "of them with --columns."
        )
    rows = [row for row in (*published, *results) if any(column in row.values for column in columns)]
    return sorted(rows, key=lambda row: (row.parameters, row.published, row.model))


def markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Renders the table; published rows are in italics, and each row names its sources. Misprints are noted below."""
    head = ["Model", "Parameters", *(f"{task} ({metric})" for task, _, metric in _split(columns)), "Average", "Source"]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 2), "---"])]
    notes = []
    for row in rows:
        name = f"*{row.model}*" if row.published else f"**{row.model}**"
        source = f"{'published' if row.published else 'measured'}: {row.source(columns)}"
        numbers = [_number(row.values.get(column)) for column in columns]
        size = format_count(row.parameters, digits=3)
        average = _number(row.average(columns))
        if row.is_misprinted(columns):
            notes.append(
                f"{MISPRINTED} {row.model}: the source prints {row.printed_average}; its figures give {average}."
            )
            average += MISPRINTED
        lines.append(_line([name, size, *numbers, average, source]))
    if notes:
        lines += ["", *(f"{note}  " for note in notes)]  # two blanks end a line of Markdown
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}" if value < 1000.0 else f"{value:.3g}"


def _split(columns: Sequence[str]) -> list[tuple[str, str, str]]:
    return [column.rpartition(":") for column in columns]


def write_csv(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    """Writes the table with all digits and the standard errors."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        stderrs = [f"{column}_stderr" for column in columns]
        writer.writerow(["model", "kind", "parameters", *columns, *stderrs, "average", "average_printed", "source"])
        for row in rows:
            values = [row.values.get(column, "") for column in columns]
            errors = [row.errors.get(column, "") for column in columns]
            average = row.average(columns)
            kind = "published" if row.published else "measured"
            numbers = ["" if number is None else number for number in (average, row.printed_average)]
            last = [*numbers, row.source(columns)]
            writer.writerow([row.model, kind, int(row.parameters), *values, *errors, *last])


def draw(rows: Sequence[Row], columns: Sequence[str]) -> Figure:
    """Draws a panel for each column and for the average, a line for each model; bars are one standard error."""
    panels = [*columns, "average"]
    figure = Figure(figsize=(2.4 + 1.75 * len(panels), 1.3 + 0.27 * len(rows)), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    places = range(len(rows) - 1, -1, -1)
    for axes, column in zip(grid, panels, strict=True):
        for place, row in zip(places, rows, strict=True):
            value = row.average(columns) if column == "average" else row.values.get(column)
            if value is None:
                continue
            colour = PUBLISHED_COLOUR if row.published else MEASURED_COLOUR
            axes.errorbar(
                value,
                place,
                xerr=row.errors.get(column) or None,
                marker="o",
                markersize=5,
                color=colour,
                markerfacecolor="white" if row.published else colour,
                linestyle="none",
                capsize=2,
            )
        task, _, metric = column.rpartition(":")
        unit = " [%]" if column == "average" or is_share(column) else ""
        axes.set_title(task or column, fontsize=9)
        axes.set_xlabel(f"{metric if task else 'mean'}{unit}", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    grid[0].set_yticks(list(places), [label(row.model) for row in rows])
    for tick, row in zip(grid[0].get_yticklabels(), rows, strict=True):
        tick.set_color(PUBLISHED_COLOUR if row.published else MEASURED_COLOUR)
    figure.suptitle("measured (filled) and published (hollow)", fontsize=9)
    return figure


def main(argv: Sequence[str]) -> int:
    """Writes the three files. Raises DataError for files that are no results, ConfigError for a malformed column."""
    parser = tool_parser(__doc__)
    parser.add_argument("results", nargs="+", type=local_path, metavar="RESULTS.json", help="files that eval.py wrote")
    parser.add_argument(
        "--output", type=local_path, default=Path("zero_shot"), help="path of the files, without suffix"
    )
    parser.add_argument(
        "--columns", nargs="+", default=list(COLUMNS), metavar="TASK:METRIC", help="columns of the table"
    )
    parser.add_argument("--published", type=local_path, default=PUBLISHED, help="CSV of published rows")
    parser.add_argument("--without-published", action="store_true", help="leave the published rows out")
    options = parser.parse_args(argv)
    for column in options.columns:
        if not all(column.partition(":")[::2]):
            raise ConfigError(f"--columns: {column!r} is not TASK:METRIC, as in hellaswag:acc_norm.")
    published = [] if options.without_published else read_published(options.published)
    rows = join(read_results(options.results), published, options.columns)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(rows, options.columns)
    Path(f"{options.output}.md").write_text(text, encoding="utf-8")
    write_csv(rows, options.columns, Path(f"{options.output}.csv"))
    draw(rows, options.columns).savefig(f"{options.output}.png", dpi=150)
    print(text, end="")
    return 0


if __name__ == "__main__":
    run_tool(main)
