"""Quantities that runs are drawn by: their metrics, units, ticks, horizontal axes, colours and smoothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron.monitor.format_quantities import format_count

# Okabe and Ito's palette, told apart by colour-blind readers; without its yellow, too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SPLITS = {"train": "training", "valid": "validation", "test": "test"}


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    label: str
    """Quantity and unit."""

    metrics: tuple[str, ...]
    """Keys of metrics.jsonl that share the axes."""

    scale: float = 1.0
    """Factor from the recorded to the drawn unit."""

    format: Callable[[float], str] = "{:g}".format
    """Tick labels."""

    from_zero: bool = True
    """Start the axis at 0, so that heights compare."""

    smoothed: bool = False
    """Apply the moving average."""


def format_power(value: float) -> str:
    """Formats 0.0006 as 6e-4."""
    if value == 0.0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def format_tick(value: float) -> str:
    """Formats 417,500 as 417.5k: ticks need a digit more than numbers in text."""
    return format_count(value, digits=4)


PANELS = {
    "loss": Panel(
        "loss [nat/token]", ("train/lm_loss", "valid/lm_loss", "test/lm_loss"), from_zero=False, smoothed=True
    ),
    "distillation": Panel("distillation loss [nat/token]", ("train/distillation_loss",), smoothed=True),
    "perplexity": Panel("perplexity", ("valid/perplexity", "test/perplexity"), from_zero=False),
    "learning_rate": Panel("learning rate", ("train/learning_rate",), format=format_power),
    "grad_norm": Panel("gradient norm", ("train/grad_norm",), smoothed=True),
    "throughput": Panel("tokens/s", ("train/tokens_per_second",), format=format_tick, smoothed=True),
    "mfu": Panel("MFU [%]", ("train/mfu",), scale=100.0, smoothed=True),
    "data_wait": Panel("waiting for data [%]", ("train/data_wait_share",), scale=100.0, smoothed=True),
    "memory": Panel("peak memory [GiB]", ("train/memory_gib",)),
}

X_AXES: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps": ("optimizer steps", lambda value: f"{value:,.0f}"),
    "tokens": ("training tokens", format_tick),
    "flops": ("training compute [FLOP]", format_power),
}


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Averages `window` values around each, fewer towards the ends; NaN is left out, and stays NaN itself.

    Symmetric, so that a falling curve is not drawn too late.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    index = np.arange(len(values))
    reach = np.minimum(window // 2, np.minimum(index, len(values) - 1 - index))
    low, high = index - reach, index + reach + 1
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(known, means, math.nan)
