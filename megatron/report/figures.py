"""Figures of runs for a page: plotly's, with hover, zoom, smoothing and a choice of the horizontal axis.

Text of runs goes into them escaped: plotly reads a few HTML tags in names.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megatron.errors import DataError
from megatron.report.foreign_values import one_line
from megatron.report.panels import COLOURS, PANELS, SPLITS, Panel, moving_average
from megatron.report.run_files import RunFiles
from megatron.report.run_records import RunRecord, positions, series

X_TITLES = {"steps": "optimizer steps", "tokens": "training tokens", "flops": "training compute [FLOP]"}
WINDOWS = (1, 5, 25, 100)
"""Rows that the smoothing on offer averages over."""
MOST_POINTS = 2000
"""Points of a curve that are drawn of a single run; several runs share twice as many."""
SHAPES = ("solid", "dash", "dot", "dashdot")
"""Strokes that tell runs apart once their colours begin again."""
PANEL_HEIGHT, FIRST_PANEL_HEIGHT, PANEL_GAP, TOP, BOTTOM = 190, 300, 62, 112, 48
MENU_PLACE, MENU_HEIGHT = 24, 34
"""Heights of a figure's parts, and of the menus above its first panel [pixels]."""
MARKED_EVENTS = {"growth": "dash", "rollback": "dot", "non_finite": "dot", "resume": "dot"}
"""Events that are drawn through all panels, with their strokes."""
GREY = "rgba(128, 128, 128, 0.75)"
MARGIN = {"l": 52, "r": 12, "t": TOP, "b": BOTTOM}
_LEGEND = {"orientation": "h", "x": 0.0, "xanchor": "left", "yanchor": "bottom"}
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif'


@dataclass(frozen=True)
class _Curve:
    """A line of one panel, at every choice of the horizontal axis and of the smoothing."""

    row: int
    run: int
    metric: str
    places: dict[str, list[float]]
    values: dict[int, list[float | None]]
    """By window; one window for what is not smoothed."""


def curves_figure(runs: Sequence[RunFiles], x: str = "steps", smooth: int = 1) -> go.Figure | None:
    """Draws all that was recorded, a panel for each quantity over a shared horizontal axis; None without any row.

    `x` and the window `smooth` [rows] are what the page begins with; buttons offer the others.
    """
    recorded = {key for run in runs for row in run.record.records for key in row}
    panels = [panel for panel in PANELS.values() if recorded.intersection(panel.metrics)]
    if not panels:
        return None
    axes = _axes_of_all(runs)
    if x not in axes:
        raise DataError(f"--x {x}: not all of these runs have recorded what it needs. Use {' or '.join(axes)}.")
    windows = sorted({*WINDOWS, smooth})
    curves = [curve for row, panel in enumerate(panels, 1) for curve in _panel_curves(runs, panel, row, axes, windows)]
    heights = [FIRST_PANEL_HEIGHT, *[PANEL_HEIGHT] * (len(panels) - 1)]
    inner = sum(heights) + PANEL_GAP * (len(panels) - 1)
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        shared_xaxes=True,
        row_heights=heights,
        vertical_spacing=PANEL_GAP / inner,
        subplot_titles=[panel.label for panel in panels],
    )
    named: set[str] = set()
    for curve in curves:
        figure.add_trace(_line(runs, curve, panels[curve.row - 1], x, smooth, named), row=curve.row, col=1)
    for row, panel in enumerate(panels, 1):
        own = [value for curve in curves if curve.row == row for value in curve.values[1] if value is not None]
        figure.update_yaxes(_vertical_axis(panel, own), row=row, col=1)
    figure.update_xaxes(showticklabels=True, exponentformat="SI", showspikes=True, spikethickness=1, spikecolor=GREY)
    figure.update_xaxes(title_text=X_TITLES[x], row=len(panels), col=1)
    figure.update_annotations(x=0.0, xanchor="left", font_size=13, yshift=2)
    last = "xaxis" if len(panels) == 1 else f"xaxis{len(panels)}"
    figure.update_layout(
        **_style(inner + TOP + BOTTOM),
        hovermode="x unified",
        # The names may take several rows; they grow upwards from the menus, which stand on the first panel's title.
        legend=_LEGEND | {"y": 1.0 + (MENU_PLACE + MENU_HEIGHT) / inner},
        shapes=_event_lines(runs, x, len(panels)),
        updatemenus=[
            _choice_of_axis(runs, curves, axes, x, last, len(panels)),
            _choice_of_smoothing(curves, windows, smooth),
        ],
        uirevision="kept",
    )
    return figure


def scores_figure(runs: Sequence[RunFiles]) -> go.Figure | None:
    """Draws each task's accuracy over the checkpoints that were scored; None where no run has several of them."""
    points: dict[str, dict[str, dict[int, tuple[float, float]]]] = {}
    for run in runs:
        for scores in run.scores:
            for (task, metric), (value, error) in scores.metrics.items():
                if metric == "acc":
                    of_run = points.setdefault(task, {}).setdefault(run.name, {})
                    of_run[scores.iteration] = (value, error or 0.0)
    if not any(len(steps) > 1 for by_run in points.values() for steps in by_run.values()):
        return None
    tasks, names = sorted(points), [run.name for run in runs]
    inner = PANEL_HEIGHT * len(tasks) + PANEL_GAP * (len(tasks) - 1)
    figure = make_subplots(
        rows=len(tasks),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=PANEL_GAP / inner,
        subplot_titles=list(map(_name, tasks)),
    )
    for row, task in enumerate(tasks, 1):
        for name, steps in points[task].items():
            places = sorted(steps)
            line = go.Scatter(
                name=_name(name),
                legendgroup=name,
                showlegend=row == 1 and len(runs) > 1,
                x=places,
                y=[steps[place][0] for place in places],
                error_y={"array": [steps[place][1] for place in places], "thickness": 1},
                mode="lines+markers",
                line={"color": COLOURS[names.index(name) % len(COLOURS)]},
            )
            figure.add_trace(line, row=row, col=1)
    figure.update_xaxes(showticklabels=True)
    figure.update_xaxes(title_text=X_TITLES["steps"], row=len(tasks), col=1)
    figure.update_annotations(x=0.0, xanchor="left", font_size=13)
    figure.update_layout(
        **_style(inner + TOP - MENU_HEIGHT + BOTTOM) | {"margin": MARGIN | {"t": TOP - MENU_HEIGHT}},
        legend=_LEGEND | {"y": 1.0 + MENU_PLACE / inner},
        hovermode="x unified",
        uirevision="kept",
    )
    return figure


def _style(height: int) -> dict[str, Any]:
    """Returns the looks that all figures share; the page's style sheet gives text and grid their colours."""
    return {
        "height": height,
        "margin": MARGIN,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12},
        "template": "none",
        "dragmode": "zoom",
        "xaxis": {"gridcolor": GREY, "automargin": True},
        "hoverlabel": {"namelength": 40},
    }


def _name(text: str) -> str:
    return html.escape(one_line(text))


def _axes_of_all(runs: Sequence[RunFiles]) -> list[str]:
    """Returns the horizontal axes that every run with rows has a place on."""
    found = []
    for x in X_TITLES:
        try:
            for run in runs:
                positions(run.record, run.record.records, x)
        except DataError:
            continue
        found.append(x)
    return found


def _panel_curves(
    runs: Sequence[RunFiles], panel: Panel, row: int, axes: Sequence[str], windows: Sequence[int]
) -> list[_Curve]:
    most = max(MOST_POINTS if len(runs) == 1 else 2 * MOST_POINTS // len(runs), 100)
    found = []
    for index, run in enumerate(runs):
        for metric in panel.metrics:
            _, values = series(run.record, metric, "steps")
            if not len(values):
                continue
            kept = thinned(values, most)
            smoothed = panel.smoothed and metric.startswith("train/")
            found.append(
                _Curve(
                    row,
                    index,
                    metric,
                    {x: _numbers(series(run.record, metric, x)[0][kept], 9) for x in axes},
                    {
                        window: _values(moving_average(values, window)[kept] * panel.scale)
                        for window in (windows if smoothed else (1,))
                    },
                )
            )
    return found


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """Chooses at most `most` places of a curve, its lowest and highest values in each stretch, so that spikes stay."""
    if len(values) <= most:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), most // 2 - 1):
        known = stretch[np.isfinite(values[stretch])]
        # A stretch without any value is a gap, which one place of it keeps open.
        kept |= (
            {int(known[values[known].argmin()]), int(known[values[known].argmax()])}
            if len(known)
            else {int(stretch[0])}
        )
    return np.array(sorted(kept))


def _numbers(values: np.ndarray, digits: int) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values]


def _values(values: np.ndarray) -> list[float | None]:
    """Rounds values for the page; what was not finite is a gap."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def _line(runs: Sequence[RunFiles], curve: _Curve, panel: Panel, x: str, smooth: int, named: set[str]) -> go.Scatter:
    """Draws runs in colours and splits in strokes; the splits of a single run in colours."""
    split = curve.metric.partition("/")[0]
    several = len(runs) > 1
    position = curve.run if several else list(SPLITS).index(split)
    name = runs[curve.run].name if several else SPLITS[split]
    legend = f"{curve.run}" if several else split
    values = curve.values.get(smooth, curve.values[1])
    few = sum(value is not None for value in values) < 30
    mode = {"train": "lines+markers" if few else "lines", "valid": "lines+markers", "test": "markers"}[split]
    dash = "dash" if split == "valid" and several else SHAPES[position // len(COLOURS) % len(SHAPES)]
    first, shown = legend not in named, _name(name)
    named.add(legend)
    return go.Scatter(
        name=shown if not several or split == "train" else f"{shown}, {SPLITS[split]}",
        legendgroup=legend,
        showlegend=first and (several or len(SPLITS) > 1),
        x=curve.places[x],
        y=values,
        mode=mode,
        meta=curve.metric,
        line={"color": COLOURS[position % len(COLOURS)], "width": 1.6, "dash": dash},
        marker={"size": {"train": 4, "valid": 6, "test": 11}[split], "symbol": "star" if split == "test" else "circle"},
        hovertemplate="%{y:.5~g}",
    )


def _vertical_axis(panel: Panel, values: Sequence[float]) -> dict[str, Any]:
    """Returns a panel's axis: from 0 where heights are to compare, logarithmic where spikes would hide the rest."""
    axis: dict[str, Any] = {"gridcolor": GREY, "exponentformat": "SI", "nticks": 5, "zeroline": False}
    if panel.format(6e-4) == "6e-4":
        axis |= {"exponentformat": "power", "tickformat": "~g"}
    if values and min(values) > 0.0 and max(values) > 50.0 * float(np.median(values)):
        return axis | {"type": "log", "nticks": 4}
    if panel.from_zero and values:
        return axis | {"rangemode": "tozero"}
    return axis


def _event_lines(runs: Sequence[RunFiles], x: str, panels: int) -> list[dict[str, Any]]:
    """Returns a line through every panel for each event that is marked."""
    lines = []
    for index, run in enumerate(runs):
        marked = {(kind, place) for kind, place in _marked(run.record, run, x)}
        for kind, place in sorted(marked):
            for panel in range(1, panels + 1):
                suffix = "" if panel == 1 else str(panel)
                stroke = {"color": COLOURS[index % len(COLOURS)] if len(runs) > 1 else GREY, "width": 1.2}
                lines.append(
                    {
                        "type": "line", "xref": f"x{suffix}", "yref": f"y{suffix} domain", "x0": place, "x1": place,
                        "y0": 0, "y1": 1, "name": kind, "line": stroke | {"dash": MARKED_EVENTS[kind]},
                    }
                )  # fmt: skip
    return lines


def _marked(record: RunRecord, run: RunFiles, x: str) -> list[tuple[str, float]]:
    """Returns kind and place of the events to mark; those without a row of their own stand at that of their step."""
    found = [("growth", float(place)) for place in positions(record, record.events, x)] if record.events else []
    steps = positions(record, record.records, "steps")
    if not len(steps):
        return found
    places = positions(record, record.records, x)
    for event in run.events:
        if event["event"] in MARKED_EVENTS and event["event"] != "growth" and event["iteration"] > 0:
            found.append((event["event"], float(np.interp(event["iteration"], steps, places))))
    return found


def _menu(choices: Sequence[dict[str, Any]], active: int, place: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "dropdown",
        "buttons": choices,
        "active": active,
        "y": 1.0,
        "yanchor": "bottom",
        "pad": {"b": MENU_PLACE},
        "font": {"size": 12},
        "bgcolor": "rgba(128,128,128,0.12)",
        "bordercolor": GREY,
        **place,
    }


def _choice_of_axis(
    runs: Sequence[RunFiles], curves: Sequence[_Curve], axes: Sequence[str], x: str, last: str, panels: int
) -> dict[str, Any]:
    choices = [
        {
            "label": f"over {axis if axis != 'flops' else 'FLOPs'}",
            "method": "update",
            "args": [
                {"x": [curve.places[axis] for curve in curves]},
                {f"{last}.title.text": X_TITLES[axis], "shapes": _event_lines(runs, axis, panels)},
            ],
        }
        for axis in axes
    ]
    return _menu(choices, list(axes).index(x), {"x": 0.0, "xanchor": "left"})


def _choice_of_smoothing(curves: Sequence[_Curve], windows: Sequence[int], smooth: int) -> dict[str, Any]:
    smoothed = [index for index, curve in enumerate(curves) if len(curve.values) > 1]
    choices = [
        {
            "label": "as recorded" if window == 1 else f"mean of {window} rows",
            "method": "restyle",
            "args": [{"y": [curves[index].values[window] for index in smoothed]}, smoothed],
        }
        for window in windows
    ]
    return _menu(choices, list(windows).index(smooth), {"x": 1.0, "xanchor": "right"})
