"""lm-eval's log of samples: a line for each document of a task, with its requests, answers and metrics. Needs lm-eval.

The files are those of `lm_eval --log_samples`, so whatever reads its logs reads these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import hash_string

from megatron.errors import DataError

Samples = Mapping[str, Sequence[dict[str, Any]]]
"""By task, what lm-eval logs of each document and filter."""


def task_hashes(samples: Samples) -> dict[str, str]:
    """Hashes the documents, prompts and targets of each task, as lm-eval's results files do."""
    keys = ("doc_hash", "prompt_hash", "target_hash")
    return {task: hash_string("".join(row[key] for row in rows for key in keys)) for task, rows in samples.items()}


def write_samples(samples: Samples, results: Path) -> list[Path]:
    """Writes samples_TASK_TIME.jsonl into the folder beside a results file that is named like it; returns the files.

    lm-eval's own writer writes them, and raises no error. Raises DataError for a file that lacks samples.
    """
    tracker = EvaluationTracker(output_path=str(results.parent))
    tracker.general_config_tracker.model_name_sanitized = results.stem
    tracker.date_id = datetime.now().isoformat().replace(":", "-")
    files = []
    for task, rows in samples.items():
        tracker.save_results_samples(task, rows)
        path = results.with_suffix("") / f"samples_{task}_{tracker.date_id}.jsonl"
        written = path.read_bytes().count(b"\n") if path.exists() else 0
        if written != len(rows):
            raise DataError(
                f"{path}: {written} of {len(rows)} samples could be written. The results are complete without them, in "
                f"{results}; make room or name another folder (eval_output), and evaluate again with eval_cache."
            )
        files.append(path)
    return files
