"""Validation losses of the shares of an elastic run, as tables."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.report.foreign_values import is_number

WHOLE = "valid/lm_loss"
OF_SHARE = re.compile(r"valid/lm_loss_share_(\d*\.?\d+(?:e-\d+)?)")
"""Key of a share's loss in metrics.jsonl (training/callbacks/evaluation.py)."""
MOST_STEPS = 6
"""Evaluations that are shown; the first and the last are among them."""


@dataclass(frozen=True)
class ShareTable:
    """Losses of the whole model and of its shares, the largest first."""

    steps: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str], str]]
    """Share, its loss at each step, and what the last one is above the whole model's [nats per token]."""


def share_table(records: Sequence[Mapping[str, Any]]) -> ShareTable | None:
    """Returns the losses that a run's rows have by share; None for a run that is not elastic."""
    evaluated = [row for row in records if any(OF_SHARE.fullmatch(key) for key in row)]
    if not evaluated:
        return None
    keys = {key: float(found[1]) for row in evaluated for key in row if (found := OF_SHARE.fullmatch(key))}
    shares = {WHOLE: 1.0} | dict(sorted(keys.items(), key=lambda one: -one[1]))
    shown = evaluated
    if len(evaluated) > MOST_STEPS:
        spread = (len(evaluated) - 1) / (MOST_STEPS - 1)
        shown = [evaluated[round(index * spread)] for index in range(MOST_STEPS)]
    whole = _number(evaluated[-1], WHOLE)
    rows = []
    for key, share in shares.items():
        above = _number(evaluated[-1], key) - whole
        text = f"{above:+.4f}" if share < 1.0 and math.isfinite(above) else ""
        rows.append((f"{share:g}", [_shown(_number(row, key)) for row in shown], text))
    return ShareTable([f"{row['iteration']:,}" for row in shown], rows)


def _number(row: Mapping[str, Any], key: str) -> float:
    value = row.get(key)
    return float(value) if is_number(value) and value is not None else math.nan


def _shown(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else ""
