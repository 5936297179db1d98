"""Reading what eval.py writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.monitor.evaluation_metrics import metrics_of


def read_record(path: Path) -> dict[str, Any]:
    """`record`, the file's content, and `metrics`, its (task, metric) -> (value, standard error)."""
    record = json.loads(path.read_text())
    return {"record": record, "metrics": metrics_of(record["results"])}
