"""Judges growth: loss against the cost of everything, against runs that never grew, and a sentence: grow, or do not.

    python tools/growth_report.py runs/grown-1 runs/grown-2 runs/scratch-1 runs/scratch-2 --output report
    python tools/growth_report.py runs/124M+runs/354M zero_key=runs/a zero_key=runs/b @runs.txt --output report

RUN is a run's folder; FOLDER+FOLDER is a run in stages, or one that has branched off from another. Runs that differ in
seed alone form an arm; NAME=RUN names its arm. Where an arm has several learning rates, the best one counts.
Competitors are the final model from scratch and the first model alone, at the FLOPs of the grown run with its small
model's, and the final model from scratch on as many tokens. Writes report.png, runs.csv, arms.csv and report.md to the
folder. A line of metrics.jsonl that cannot be read is left out and named.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tokenformer import run_tool

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from megatron.config.local_path import local_path
from megatron.errors import EnvironmentSetupError, os_errors_as
from megatron.growth.arms import Arm, make_arms, shared_spread
from megatron.growth.compare_curves import Estimate
from megatron.growth.loss_curves import LossCurve, read_curve
from megatron.growth.verdict import Outcome, gate, judge, saving_bound, saving_of, verdict
from megatron.io.durable import atomic_write
from megatron.monitor.format_quantities import format_count
from tools.command_line import tool_parser
from tools.plots.foreign_values import label, one_line
from tools.plots.plot_runs import COLOURS, format_power

NAMED_RUN = re.compile(r"(?P<name>[^=]+)=(?P<run>.+)", re.DOTALL)
SHOWN_ARMS = len(COLOURS)
"""Arms that a figure can tell apart by colour; the others are drawn in grey."""


def main(argv: Sequence[str]) -> int:
    """Reads the runs, writes the report, and prints its verdict; returns the exit code."""
    args = parse_args(argv)
    runs: list[tuple[str | None, LossCurve]] = []
    damaged: list[str] = []
    for words in args.runs:
        named = NAMED_RUN.fullmatch(words)
        curve, lines = read_curve(named["run"] if named else words)
        runs.append((named["name"] if named else None, curve))
        damaged += lines
    for line in damaged:
        print(f"warning: {line}", file=sys.stderr)
    arms = make_arms(runs)
    outcomes = judge(arms, [curve for _, curve in runs])
    write_report(args.output, arms, outcomes, damaged)
    print("\n".join(line for line in sentences(arms, outcomes) if line))
    print(args.output / "report.md")
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; @FILE stands for the words in a file, one on each line."""
    parser = tool_parser(__doc__)
    parser.fromfile_prefix_chars = "@"
    parser.add_argument("runs", nargs="+", metavar="RUN", help="FOLDER, FOLDER+FOLDER, or NAME= one of them")
    parser.add_argument("--output", type=local_path, required=True, help="folder for the report")
    return parser.parse_args(argv)


@os_errors_as(EnvironmentSetupError, "--output")
def write_report(folder: Path, arms: Sequence[Arm], outcomes: Sequence[Outcome], damaged: Sequence[str]) -> None:
    """Writes the picture, both tables and the text. Raises EnvironmentSetupError where that is not possible."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "runs.csv", [run_row(arm, run) for arm in arms for run in arm.all_runs])
    write_csv(folder / "arms.csv", arm_rows(arms, outcomes))
    with atomic_write(folder / "report.png") as temporary:
        draw(arms, outcomes).savefig(temporary, dpi=130, format="png")
    with atomic_write(folder / "report.md") as temporary:
        temporary.write_text(report_text(arms, outcomes, damaged), encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows that share their columns."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def run_row(arm: Arm, run: LossCurve) -> dict[str, Any]:
    """Returns a run's row of runs.csv; one whose learning rate is not its arm's best does not count."""
    return {
        "arm": arm.name,
        "run": run.name,
        "counts": "yes" if run in arm.runs else "no",
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "parameters": run.parameters,
        "growth_factor": "" if arm.factor is None else f"{arm.factor:.4g}",
        "growth_at": "" if arm.growth_at is None else f"{arm.growth_at:.4f}",
        "tokens": round(run.tokens),
        "tokens_per_parameter": f"{run.tokens / run.parameters:.4g}",
        "flops": f"{run.flops:.6e}",
        "valid_loss": f"{run.loss:.6f}",
    }


def arm_rows(arms: Sequence[Arm], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Returns the rows of arms.csv, the lowest loss first."""
    by_arm = {outcome.arm.name: outcome for outcome in outcomes}
    spread = shared_spread(arms)
    rows = []
    for arm in sorted(arms, key=lambda arm: arm.loss().mean):
        outcome = by_arm.get(arm.name)
        row: dict[str, Any] = {
            "arm": arm.name,
            "growth_factor": "" if arm.factor is None else f"{arm.factor:.4g}",
            "growth_at": "" if arm.growth_at is None else f"{arm.growth_at:.4f}",
            "parameters": arm.first.parameters,
            "tokens": round(arm.first.tokens),
            "tokens_per_parameter": f"{arm.tokens_per_parameter:.4g}",
            "flops": f"{arm.first.flops:.6e}",
            "learning_rate": arm.first.learning_rate,
            "rates_tried": arm.rates_tried,
            "seeds": len(arm.runs),
            **_estimate_columns("valid_loss", arm.loss(spread)),
        }
        against = {} if outcome is None else outcome.against
        for name in ("scratch", "small", "scratch_full"):
            row |= _estimate_columns(f"above_{name}", against.get(name))
        row |= _estimate_columns("saving", None if outcome is None else saving_of(outcome))
        row["saving_bound"] = "" if outcome is None else saving_bound(outcome)
        recoveries = () if outcome is None else outcome.recoveries
        row["jump"] = f"{sum(each.jump for each in recoveries) / len(recoveries):.6f}" if recoveries else ""
        row["steps_to_loss_before"] = _steps([each.steps_to_before for each in recoveries])
        row["steps_to_twin"] = _steps([each.steps_to_twin for each in recoveries if each.has_twin])
        rows.append(row)
    return rows


def _estimate_columns(name: str, estimate: Estimate | None) -> dict[str, str]:
    if estimate is None:
        return {name: "", f"{name}_half_width": ""}
    width = "" if math.isinf(estimate.half_width) else f"{estimate.half_width:.6f}"
    return {name: f"{estimate.mean:.6f}", f"{name}_half_width": width}


def _steps(counts: Sequence[int | None]) -> str:
    """Writes the steps of every seed; `never` where the run ended before."""
    return " ".join("never" if count is None else str(count) for count in counts)


def report_text(arms: Sequence[Arm], outcomes: Sequence[Outcome], damaged: Sequence[str]) -> str:
    """Returns report.md: the verdict, the figure and a table of all arms."""
    columns = {
        "arm": "arm", "growth_factor": "growth", "growth_at": "at", "tokens_per_parameter": "tokens/param",
        "flops": "FLOPs", "learning_rate": "learning rate", "valid_loss": "loss", "above_scratch": "above scratch",
        "above_small": "above small", "above_scratch_full": "above scratch, equal tokens", "saving": "saving",
        "jump": "jump", "steps_to_loss_before": "steps to loss before", "steps_to_twin": "steps to twin",
    }  # fmt: skip
    lines = ["# Growth: the verdict", "", *sentences(arms, outcomes), "![loss against cost](report.png)", ""]
    lines += [f"| {' | '.join(columns.values())} |", f"|{'---|' * len(columns)}"]
    for row in arm_rows(arms, outcomes):
        lines.append(f"| {' | '.join(_cell(row, column) for column in columns)} |")
    lines += [
        "",
        "Losses are validation losses at the end [nat per token] ± half a 95 % confidence interval over seeds, whose "
        "spread all arms share; those of differences hold for all grown arms at once (Bonferroni). FLOPs and tokens "
        "count the smaller model's too. Small is the model before growth alone, scratch the model after it, both at "
        "equal FLOPs. Saving is the share of FLOPs that the same loss takes less than from scratch. A jump is the "
        "first validation loss after growth above the last one before. The twin is the run that did not grow, at the "
        "same learning rate. An arm with several learning rates is shown at its best.",
    ]
    if damaged:
        lines += ["", "Lines that could not be read, and were left out:", "", *(f"- {line}" for line in damaged)]
    return "\n".join(lines) + "\n"


CELLS: dict[str, Callable[[float], str]] = {
    "valid_loss": "{:.3f}".format,
    "above_scratch": "{:+.3f}".format,
    "above_small": "{:+.3f}".format,
    "above_scratch_full": "{:+.3f}".format,
    "jump": "{:+.3f}".format,
    "saving": "{:z.0%}".format,
    "growth_factor": "{:.3g}x".format,
    "growth_at": "{:.0%}".format,
    "flops": format_power,
    "learning_rate": format_power,
}
"""How report.md writes the columns that hold numbers."""


def sentences(arms: Sequence[Arm], outcomes: Sequence[Outcome]) -> list[str]:
    """Returns the verdict, and how sizes compare without growth, a paragraph each."""
    said = [verdict(outcomes)] if outcomes or not gate(arms) else []
    return [line for paragraph in (*said, gate(arms)) if paragraph for line in (paragraph, "")]


def _cell(row: Mapping[str, Any], column: str) -> str:
    value, width = str(row[column]), row.get(f"{column}_half_width", "")
    if column not in CELLS or not value:
        return one_line(value).replace("|", "\\|")
    text = CELLS[column](float(value))
    if width:
        text += f" ± {CELLS[column](float(width)).removeprefix('+')}"
    if column == "saving" and row["saving_bound"]:
        return f"{row['saving_bound']} {text}"
    if column == "learning_rate" and row["rates_tried"] > 1:
        return f"{text} of {row['rates_tried']}"
    return text


def draw(arms: Sequence[Arm], outcomes: Sequence[Outcome]) -> Figure:
    """Draws the loss over FLOPs and over tokens, and every arm's final loss with its interval."""
    ranked = sorted(arms, key=lambda arm: arm.loss().mean)
    controls = {id(arm) for each in outcomes for arm in (each.scratch, each.small) if arm is not None}
    first = [arm for arm in ranked if id(arm) in controls]
    shown = [*first, *(arm for arm in ranked if id(arm) not in controls)][:SHOWN_ARMS]
    colours = {id(arm): COLOURS[index] for index, arm in enumerate(shown)}
    figure = Figure(figsize=(13.0, max(6.0, 1.5 + 0.24 * len(arms))), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.3, 1.0))
    for row, (x, quantity) in enumerate((("flops", "training compute, small model's included [FLOP]"),
                                      ("tokens", "training tokens"))):  # fmt: skip
        ax = figure.add_subplot(grid[row, 0])
        _draw_curves(ax, ranked, colours, x)
        ax.set_xlabel(quantity)
    _draw_ends(figure.add_subplot(grid[:, 1]), ranked, colours)
    return figure


def _draw_curves(ax: Axes, arms: Sequence[Arm], colours: Mapping[int, str], x: str) -> None:
    for arm in reversed(arms):
        colour, order = colours.get(id(arm), "0.8"), 3 if id(arm) in colours else 1
        for run in arm.runs:
            ax.plot(getattr(run.valid, x), run.valid.values, color=colour, linewidth=1.0, zorder=order, gid=arm.name)
            for event in run.growths:
                level = run.valid.until(event.step).values
                if len(level):
                    ax.plot(getattr(event, x), level[-1], marker="^", color=colour, zorder=order + 1, gid="growth")
    ax.set_xscale("log")
    ends = [run.loss for arm in arms for run in arm.runs if math.isfinite(run.loss)] or [0.0]
    # The fall from the initial loss would press everything that differs to the floor.
    low, high = min(ends), max(ends)
    ax.set_ylim(low - 0.05 * (high - low) - 0.02, high + 2.0 * (high - low) + 0.2)
    ax.set_ylabel("validation loss [nat/token]")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_power(value) if x == "flops" else _count(value)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(color="0.9", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)


def _count(value: float) -> str:
    return format_count(value, digits=4)


def _draw_ends(ax: Axes, arms: Sequence[Arm], colours: Mapping[int, str]) -> None:
    spread = shared_spread(arms)
    for place, arm in enumerate(arms):
        half_width = arm.loss(spread).half_width
        width = half_width if math.isfinite(half_width) else 0.0
        colour = colours.get(id(arm), "0.6")
        ax.errorbar(arm.loss().mean, place, xerr=width, color=colour, capsize=3, gid=arm.name)
        ax.plot([run.loss for run in arm.runs], [place] * len(arm.runs), "o", color=colour, markersize=4, gid=arm.name)
    ax.set_yticks(range(len(arms)), [f"{label(arm.name)}\n{_facts(arm)}" for arm in arms], fontsize=7)
    ax.invert_yaxis()
    ax.yaxis.tick_right()
    ax.set_xlabel("final validation loss [nat/token], each seed, and 95 % of the mean")
    ax.grid(color="0.9", linewidth=0.8, axis="x")
    ax.spines[["top", "left"]].set_visible(False)


def _facts(arm: Arm) -> str:
    growth = "" if arm.factor is None else f"{arm.factor:.2g}x, "
    return f"{growth}{arm.tokens_per_parameter:.1f} tokens/param, lr {format_power(arm.first.learning_rate)}"


if __name__ == "__main__":
    run_tool(main)
