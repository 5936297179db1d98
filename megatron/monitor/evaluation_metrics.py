"""Metrics of an evaluation's results, as lm-eval writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def metrics_of(results: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], tuple[float, float | None]]:
    """Returns (task, metric) -> (value, its standard error) from the `results` of a record.

    A filter other than none belongs to the metric's name, as in `exact_match,strict-match`.
    """
    found = {}
    for task, entries in results.items():
        for key, value in entries.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = entries.get(f"{metric}_stderr,{filter_name}")
            name = metric if filter_name == "none" else key
            found[task, name] = (float(value), float(error) if isinstance(error, int | float) else None)
    return found
