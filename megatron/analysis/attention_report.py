"""Writes measured attention as tables and figures, with the nulls in both."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from megatron.analysis.attention_statistics import (
    NULLS,
    STATISTICS,
    HeadStatistics,
    Statistic,
    layer_statistics,
    null_statistics,
)

NAMES = [statistic.name for statistic in STATISTICS]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, told apart by colour-blind readers; without its yellow, too pale for lines on white."""
NULL_STYLES: dict[str, Any] = {"uniform causal": (0, (4, 2)), "pure sink": (0, (1, 1.5))}
"""Dashes of each null's line."""
NULL_MARKERS: dict[str, dict[str, Any]] = {
    "uniform causal": {"markerfacecolor": "#D55E00", "markeredgecolor": "#D55E00"},
    "pure sink": {"markerfacecolor": "white", "markeredgecolor": "#D55E00"},
}
"""Each null's triangle beside a colour bar."""
MAP = "viridis"
Nulls = Mapping[str, Mapping[str, float]]
"""Every statistic of every null."""


@dataclass(frozen=True)
class MeasuredModel:
    """Attention of one model, or of one checkpoint of a run."""

    name: str
    iteration: int | None
    """Optimizer steps of the checkpoint [steps]; None for a model of Hugging Face."""
    heads: HeadStatistics

    @property
    def step(self) -> str:
        """Returns the step in words; empty where there is none."""
        return "" if self.iteration is None else f"step {self.iteration:,}"

    @property
    def label(self) -> str:
        """Returns the name, with the step where there is one."""
        return ", ".join(filter(None, (self.name, self.step)))


def write_report(measured: Sequence[MeasuredModel], folder: Path, length: int, tau: float) -> list[Path]:
    """Writes heads.csv, layers.csv, layers.png, and for each model heads-NAME.png and, over steps, training-NAME.png.

    `length` and `tau` are those of the measurement, for the nulls. Returns the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    nulls = null_statistics(length, tau)
    files = [folder / "heads.csv", folder / "layers.csv"]
    _write_csv(files[0], ("model", "iteration", "layer", "head", *NAMES), head_rows(measured))
    _write_csv(files[1], ("model", "iteration", "layer", *NAMES), layer_rows(measured, nulls))
    figures = {"layers": draw_layers(measured, nulls)}
    names = list(dict.fromkeys(each.name for each in measured))
    for name in names:
        of_model = [each for each in measured if each.name == name]
        word = short_name(name, names)
        figures[f"heads-{word}"] = draw_heads(of_model[-1], nulls)
        if len(of_model) > 1:
            figures[f"training-{word}"] = draw_training(of_model, nulls)
    for stem, figure in figures.items():
        files.append(folder / f"{stem}.png")
        figure.savefig(files[-1], dpi=150)
    return files


def short_name(name: str, names: Sequence[str]) -> str:
    """Returns as many of the last folders of a path as tell it from the other `names`, as part of a file's name."""
    folders = Path(name).parts
    for count in range(1, len(folders) + 1):
        ending = folders[-count:]
        if sum(Path(other).parts[-count:] == ending for other in names) == 1:
            break
    return "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in "-".join(ending))


def head_rows(measured: Sequence[MeasuredModel]) -> Iterator[tuple[Any, ...]]:
    """Yields a row of heads.csv for each layer and head, both counted from 1; values are means over sequences."""
    for each in measured:
        layers, heads = each.heads[NAMES[0]].shape
        for layer in range(layers):
            for head in range(heads):
                values = (float(each.heads[name][layer, head]) for name in NAMES)
                yield each.name, each.iteration, layer + 1, head + 1, *values


def layer_rows(measured: Sequence[MeasuredModel], nulls: Nulls) -> Iterator[tuple[Any, ...]]:
    """Yields a row of layers.csv for each layer, and one for each null, which has no layer."""
    for each in measured:
        layers = layer_statistics(each.heads)
        for layer in range(len(layers[NAMES[0]])):
            yield each.name, each.iteration, layer + 1, *(float(layers[name][layer]) for name in NAMES)
    for name, values in nulls.items():
        yield f"null: {name}", None, None, *(values[key] for key in NAMES)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterator[tuple[Any, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def draw_layers(measured: Sequence[MeasuredModel], nulls: Nulls) -> Figure:
    """Draws each statistic by layer: a line for each model, or for each checkpoint of a single run, and the nulls."""
    figure = Figure(figsize=(9.6, 7.0), layout="constrained")
    is_one_run = len({each.name for each in measured}) == 1
    shown = measured if is_one_run else list({each.name: each for each in measured}.values())
    shades = [*colormaps[MAP](np.linspace(0.95, 0.0, len(shown)))] if is_one_run else COLOURS
    if is_one_run:
        figure.suptitle(measured[0].name)
    for axes, statistic in zip(figure.subplots(2, 2).flatten(), STATISTICS, strict=True):
        for number, each in enumerate(shown):
            values = layer_statistics(each.heads)[statistic.name].numpy()
            label = (is_one_run and each.step) or each.label
            axes.plot(range(1, len(values) + 1), values, color=shades[number % len(shades)], marker="o",
                      markersize=3.5, linewidth=1.4, label=label)  # fmt: skip
        for name in NULLS:
            axes.axhline(nulls[name][statistic.name], color="0.35", linewidth=1.0, linestyle=NULL_STYLES[name],
                         label=f"{name} (null)")  # fmt: skip
        axes.set_ylim(bottom=0.0)
        axes.set_title(_of_layer(statistic), fontsize=10)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), 110 // (max(map(len, labels)) + 6)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return figure


def draw_heads(model: MeasuredModel, nulls: Nulls) -> Figure:
    """Draws each statistic of a model as a map of layers and heads."""
    layers, heads = model.heads[NAMES[0]].shape
    figure = _figure_of_maps(model.label, layers, heads)
    for axes, statistic in zip(figure.subplots(2, 2).flatten(), STATISTICS, strict=True):
        _draw_map(axes, model.heads[statistic.name].numpy(), statistic, nulls)
        axes.set_title(statistic.label, fontsize=10)
        axes.set_xlabel("head")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    return figure


def draw_training(checkpoints: Sequence[MeasuredModel], nulls: Nulls) -> Figure:
    """Draws each statistic of a run as a map of layers and checkpoints, in the order of their steps."""
    layers = [layer_statistics(each.heads) for each in checkpoints]
    deepest = max(len(of_model[NAMES[0]]) for of_model in layers)
    figure = _figure_of_maps(checkpoints[0].name, deepest, len(checkpoints))
    every = -(-len(checkpoints) // 10)
    for axes, statistic in zip(figure.subplots(2, 2).flatten(), STATISTICS, strict=True):
        # A run that has grown in depth has fewer layers at first.
        values = np.full((deepest, len(checkpoints)), np.nan)
        for column, of_model in enumerate(layers):
            values[: len(of_model[statistic.name]), column] = of_model[statistic.name].numpy()
        _draw_map(axes, values, statistic, nulls)
        axes.set_title(_of_layer(statistic), fontsize=10)
        axes.set_xlabel("optimizer steps")
        ticks, labels = range(1, len(checkpoints) + 1, every), [f"{each.iteration:,}" for each in checkpoints[::every]]
        axes.set_xticks(ticks, labels, rotation=45, ha="right", fontsize=8)
    return figure


def _figure_of_maps(title: str, down: int, across: int) -> Figure:
    """Makes the figure of four maps of so many rows and columns, with a legend of the nulls."""
    size = (min(max(8.0, 0.6 * across + 4), 20.0), min(max(5.4, 0.36 * down + 2.4), 20.0))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    marks = [
        Line2D([], [], linestyle="none", marker=">", label=f"{name} (null)", **NULL_MARKERS[name]) for name in NULLS
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _draw_map(axes: Axes, values: np.ndarray[Any, Any], statistic: Statistic, nulls: Nulls) -> None:
    """Draws values of layers (down) and something else (across), both counted from 1; the scale holds the nulls."""
    marks = {name: nulls[name][statistic.name] for name in NULLS}
    low, high = min(*marks.values(), np.nanmin(values)), max(*marks.values(), np.nanmax(values))
    down, across = values.shape
    extent = (0.5, across + 0.5, down + 0.5, 0.5)
    image = axes.imshow(values, aspect="auto", extent=extent, interpolation="nearest", cmap=MAP, vmin=low, vmax=high)
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    bar = axes.get_figure().colorbar(image, ax=axes)  # type: ignore[union-attr]
    for name, mark in marks.items():
        bar.ax.plot(-0.4, mark, marker=">", clip_on=False, transform=bar.ax.get_yaxis_transform(), **NULL_MARKERS[name])


def _of_layer(statistic: Statistic) -> str:
    return f"{statistic.label}, {statistic.of_layer} over heads"
