"""Sums where the time of a run went, from its metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from megatron.report.foreign_values import is_number

PARTS = {
    "computing": "#0072B2", "waiting for other ranks": "#56B4E9", "waiting for data": "#E69F00", "saves": "#D55E00",
    "evaluation": "#009E73", "samples": "#CC79A7",
}  # fmt: skip
"""Parts of a run's time, and the colours that they are drawn in."""
PAUSES = {
    "saves": "train/save_wait_seconds",
    "evaluation": "train/evaluation_seconds",
    "samples": "train/sampling_seconds",
}


def time_spent(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the seconds of each of PARTS, over the rows of a run by rising iteration [s].

    A row's step time is the mean of all steps since the row before it; of the ranks, the median one counts. What comes
    before the first step and after the last row, such as loading and the last save, is not in the metrics.
    """
    spent = dict.fromkeys(PARTS, 0.0)
    timed = [row for row in records if _number(row, "train/step_seconds")]
    # A run that has branched off from another one does not begin at step 0: its first row is as long as its second.
    steps = [row["iteration"] for row in timed]
    lengths = [later - step for step, later in pairwise(steps)]
    lengths = [min([*steps[:1], *lengths[:1]], default=0), *lengths]
    for row, length in zip(timed, lengths, strict=False):
        training = length * _number(row, "train/step_seconds")
        data = min(_number(row, "train/data_wait_share"), 1.0) * training
        # What a rank does not spend in collectives; its waiting for data is in there.
        own = length * _number(row, "train/rank_seconds_median")
        ranks = min(max(training - own, 0.0), training - data) if own else 0.0
        spent["waiting for data"] += data
        spent["waiting for other ranks"] += ranks
        spent["computing"] += training - data - ranks
    for part, metric in PAUSES.items():
        spent[part] = math.fsum(_number(row, metric) for row in records)
    return spent


def _number(row: Mapping[str, Any], metric: str) -> float:
    value: Any = row.get(metric)
    return max(float(value), 0.0) if is_number(value) and value == value else 0.0  # noqa: PLR0124 - NaN
