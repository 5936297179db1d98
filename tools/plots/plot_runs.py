"""Draws the curves of one or many runs: loss, learning rate, gradient norm, throughput.

    python tools/plots/plot_runs.py runs/demo --x tokens --output curves.png

RUN is a run's folder or its metrics.jsonl. Several runs share the axes, a colour each, and are called by their
configurations. Where one is more than ten times as long as another, the horizontal axis is logarithmic (--no-log-x).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tokenformer import run_tool

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from megatron.config.local_path import local_path
from megatron.errors import DataError, EnvironmentSetupError
from megatron.monitor.format_quantities import format_count
from megatron.report.foreign_values import label
from megatron.report.panels import COLOURS, PANELS, SPLITS, X_AXES, Panel, moving_average
from megatron.report.run_records import RunRecord, load_runs, positions, series
from tools.command_line import tool_parser

OUTPUT_SUFFIXES = (".png", ".pdf", ".svg")
LONGEST_ON_A_LINEAR_AXIS = 10.0
"""Length of the longest run, in lengths of the shortest, up to which both can be read on a linear axis."""
SPLIT_STYLES: dict[str, dict[str, Any]] = {
    "train": {"linewidth": 1.2},
    "valid": {"linewidth": 1.2, "linestyle": "--", "marker": "o", "markersize": 6, "markeredgecolor": "white"},
    "test": {"linestyle": "none", "marker": "*", "markersize": 14, "markeredgecolor": "white"},
}
REFERENCE_STYLE: dict[str, Any] = {"color": "0.35", "linewidth": 1.0, "linestyle": (0, (1.5, 1.5))}


DEFAULT_PANELS = ("loss", "learning_rate", "grad_norm", "throughput")


def draw(
    runs: Sequence[RunRecord],
    *,
    x: str = "steps",
    metrics: Sequence[str] | None = None,
    smooth: int = 1,
    log_x: bool | None = None,
    references: Sequence[tuple[float, str]] = (),
) -> Figure:
    """Draws a column of panels over a shared horizontal axis, the first one taller.

    `metrics` are names in PANELS; None draws the usual ones that were recorded. `smooth` is the window of the moving
    average of training metrics [rows], drawn over the pale raw curve. `references` are labelled levels in the loss
    panel [nat]. `log_x` None makes the horizontal axis logarithmic where a run would be too short to be seen beside
    another. Raises DataError where a requested metric is in no run, or `x` cannot be computed.
    """
    panels = _chosen_panels(runs, metrics)
    if references and PANELS["loss"] not in panels:
        raise DataError("--reference is a level of the loss, which is not among the metrics drawn.")
    heights = [2.2 if index == 0 and len(panels) > 1 else 1.0 for index in range(len(panels))]
    figure = Figure(figsize=(9.0, 1.2 + 1.7 * sum(heights)), layout="constrained")
    axes = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    ends = [float(positions(run, run.records, x)[-1]) for run in runs]
    # Short runs last, so that long ones do not cover them.
    order = sorted(range(len(runs)), key=lambda index: -ends[index])
    for ax, panel in zip(axes, panels, strict=True):
        for index in order:
            for metric in panel.metrics:
                curve = series(runs[index], metric, x)
                _draw_curve(ax, curve, panel, metric, colour=_colour(runs, index, metric), window=smooth)
        _dress(ax, panel)
        if panel is PANELS["loss"]:
            for value, name in references:
                ax.axhline(value, label=f"{label(name)}: {value:.3f}", gid=f"reference {name}", **REFERENCE_STYLE)
    for index, run in enumerate(runs):
        _mark_events(axes, run, x, "0.35" if len(runs) == 1 else COLOURS[index % len(COLOURS)])
    quantity, format_x = X_AXES[x]
    axes[-1].set_xlabel(quantity)
    if log_x or (log_x is None and max(ends) > LONGEST_ON_A_LINEAR_AXIS * min(ends) > 0):
        axes[-1].set_xscale("log")
    else:
        axes[-1].set_xlim(left=0.0)
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_x(value)))
    _name_runs(figure, runs)
    _name_lines(axes, runs, panels)
    return figure


def _colour(runs: Sequence[RunRecord], index: int, metric: str) -> str:
    """Chooses a curve's colour: runs differ by colour and splits by line style; splits of a single run by colour."""
    position = list(SPLITS).index(_split(metric)) if len(runs) == 1 else index
    return COLOURS[position % len(COLOURS)]


def _split(metric: str) -> str:
    return metric.partition("/")[0]


def _chosen_panels(runs: Sequence[RunRecord], metrics: Sequence[str] | None) -> list[Panel]:
    recorded = {key for run in runs for record in run.records for key in record}
    available = [name for name, panel in PANELS.items() if recorded.intersection(panel.metrics)]
    if metrics is None:
        return [PANELS[name] for name in DEFAULT_PANELS if name in available]
    for name in metrics:
        if name not in available:
            raise DataError(f"metric {name!r} is in none of the runs. Recorded: {', '.join(available)}.")
    return [PANELS[name] for name in metrics]


def _draw_curve(
    ax: Axes, curve: tuple[np.ndarray, np.ndarray], panel: Panel, metric: str, *, colour: str, window: int
) -> None:
    x, y = curve[0], curve[1] * panel.scale
    style = SPLIT_STYLES[_split(metric)]
    if _split(metric) != "train":
        ax.plot(x, y, gid=metric, color=colour, zorder=3, **style)
        return
    if panel.smoothed and window > 1:
        ax.plot(x, y, gid=f"{metric} raw", color=colour, linewidth=0.8, alpha=0.25)
        y = moving_average(y, window)
    # A handful of points, or a point between gaps, would not show as a line.
    ax.plot(x, y, gid=metric, color=colour, marker="." if len(x) < 30 else "", **style)


def _mark_events(axes: Sequence[Axes], run: RunRecord, x: str, colour: str) -> None:
    """Draws a line through all panels for each event of a run, and what it was beside the first one's."""
    for event, place in zip(run.events, positions(run, run.events, x), strict=True):
        for ax in axes:
            ax.axvline(place, gid=f"event {event['event']}", color=colour, linestyle=":", linewidth=1.2, zorder=1)
        axes[0].annotate(
            _short(event),
            (place, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-3, -4),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            fontsize=7,
            color=colour,
        )


def _short(event: dict[str, Any]) -> str:
    before, after = (format_count(event[f"parameters_{when}"]) for when in ("before", "after"))
    return f"{label(str(event.get('operator')))}: {before} to {after} parameters"


def _dress(ax: Axes, panel: Panel) -> None:
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in ax.lines])
    values = values[np.isfinite(values)]
    # A few spikes would press everything else to the floor.
    if values.size and values.min() > 0.0 and values.max() > 50.0 * np.median(values):
        ax.set_yscale("log")
    elif panel.from_zero:
        ax.set_ylim(0.0, values.max(initial=0.0) * 1.1 or None)
    ax.set_ylabel(panel.label)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: panel.format(value)))
    ax.grid(color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _name_runs(figure: Figure, runs: Sequence[RunRecord]) -> None:
    """Writes the title of a single run; for several, a legend of their colours over all panels."""
    names = [
        label(run.name) + (f", {format_count(run.parameters)} parameters" if run.parameters else "") for run in runs
    ]
    if len(runs) == 1:
        figure.suptitle(names[0])
        return
    entries = [
        Line2D([], [], color=COLOURS[index % len(COLOURS)], linewidth=2.5, label=name)
        for index, name in enumerate(names)
    ]
    # About a hundred letters fit on a row, of which each entry's line takes eight.
    columns = max(1, 100 // (max(map(len, names)) + 8))
    figure.legend(handles=entries, loc="outside upper center", ncols=min(len(entries), columns), frameon=False)


def _name_lines(axes: Sequence[Axes], runs: Sequence[RunRecord], panels: Sequence[Panel]) -> None:
    """Draws a legend above the first panel that needs one: training, validation and test, and reference levels."""
    for ax, panel in zip(axes, panels, strict=True):
        recorded = {key for run in runs for record in run.records for key in record}
        drawn = [metric for metric in panel.metrics if metric in recorded]
        entries = [
            Line2D(
                [],
                [],
                color=_colour(runs, 0, metric) if len(runs) == 1 else "0.35",
                label=SPLITS[_split(metric)],
                **SPLIT_STYLES[_split(metric)],
            )
            for metric in drawn
        ]
        entries += [line for line in ax.lines if str(line.get_gid()).startswith("reference")]
        if len(entries) > 1:
            ax.legend(handles=entries, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=5, frameon=False)
            return


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the runs, panels and output of the command line."""
    parser = tool_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=local_path, metavar="RUN", help="a run's folder, or its metrics.jsonl")
    parser.add_argument("--x", choices=X_AXES, default="steps", help="horizontal axis (default: steps)")
    parser.add_argument("--output", type=local_path, default=Path("curves.png"), help=".png, .pdf or .svg to write")
    parser.add_argument("--metrics", nargs="+", choices=PANELS, help=f"panels (default: {' '.join(DEFAULT_PANELS)})")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="moving average over N rows")
    parser.add_argument(
        "--log-x",
        action=argparse.BooleanOptionalAction,
        help="logarithmic horizontal axis (default: where runs differ tenfold in length)",
    )
    parser.add_argument(
        "--reference",
        nargs=2,
        action="append",
        default=[],
        metavar=("VALUE", "LABEL"),
        help="a labelled level in the loss panel [nat]; may be given several times",
    )
    args = parser.parse_args(argv)
    if args.smooth < 1:
        parser.error("--smooth: a window is at least 1 row")
    if args.output.suffix not in OUTPUT_SUFFIXES:
        parser.error(f"--output {args.output}: the name must end in {', '.join(OUTPUT_SUFFIXES)}")
    try:
        args.reference = [(float(value), label) for value, label in args.reference]
    except ValueError as error:
        parser.error(f"--reference: {error}; give the level first, then its label")
    return args


def main(argv: Sequence[str]) -> int:
    """Draws the picture and prints its path. Returns the exit code; raises UserError for what the user can repair."""
    args = parse_args(argv)
    figure = draw(
        load_runs(args.runs),
        x=args.x,
        metrics=args.metrics,
        smooth=args.smooth,
        log_x=args.log_x,
        references=args.reference,
    )
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output, dpi=150)
    except OSError as error:
        raise EnvironmentSetupError(
            f"{args.output}: cannot be written ({error.strerror}). Give another --output."
        ) from error
    print(f"{args.output}: {len(args.runs)} run(s)")
    return 0


if __name__ == "__main__":
    run_tool(main)
