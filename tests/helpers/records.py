"""Values that runs record."""

from __future__ import annotations

import json
from pathlib import Path


def records(run: Path, key: str) -> dict[int, float]:
    """Returns iteration -> value of one key of a run's metrics.jsonl, where it was recorded."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["iteration"]: row[key] for row in rows if key in row}
