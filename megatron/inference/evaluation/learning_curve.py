"""Learning curves: each task's metrics over the checkpoints that were scored."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron.monitor.evaluation_metrics import metrics_of

COLUMNS = ("iteration", "tokens", "task", "metric", "value", "stderr")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""Okabe and Ito's palette, told apart by colour-blind readers."""
PANELS_IN_A_ROW = 3


def curve_rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each metric of each record, by task, metric and step."""
    rows = []
    for record in records:
        model = record["model"]
        for (task, metric), (value, error) in metrics_of(record["results"]).items():
            values = (model["iteration"], model["tokens"], task, metric, value, error)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return sorted(rows, key=lambda row: (row["task"], row["metric"], row["iteration"]))


def write_curve(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes `path` (.csv), and the same as a figure beside it (.png)."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    draw_curve(rows, "iteration", "optimizer steps").savefig(path.with_suffix(".png"), dpi=150)


def draw_curve(rows: Sequence[dict[str, Any]], over: str, label: str) -> Figure:
    """Draws a panel for each task's accuracies, and one for each of its other metrics; bars are one standard error.

    `over` is the column along which they are drawn, `label` what it counts.
    """
    panels: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        kind = "accuracy" if row["metric"] in ("acc", "acc_norm") else row["metric"]
        panels.setdefault((row["task"], kind), {}).setdefault(row["metric"], []).append(row)
    width = min(len(panels), PANELS_IN_A_ROW)
    height = math.ceil(len(panels) / width)
    figure = Figure(figsize=(4.2 * width, 3.0 * height), layout="constrained")
    grid = figure.subplots(height, width, squeeze=False).flatten()
    for axes, ((task, kind), metrics) in zip(grid, panels.items(), strict=False):
        for colour, (metric, points) in zip(COLOURS, metrics.items(), strict=False):
            axes.errorbar(
                [row[over] for row in points],
                [row["value"] for row in points],
                yerr=[row["stderr"] or 0.0 for row in points],
                color=colour,
                marker="o",
                markersize=4,
                linewidth=1.4,
                elinewidth=0.8,
                capsize=2,
                label=metric,
            )
        axes.set_title(task, fontsize=10)
        axes.set_ylabel(kind)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if "perplexity" in kind:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if len(metrics) > 1:
            axes.legend(frameon=False, fontsize=8)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure
