"""Results of an evaluation as a JSON file like lm-eval's, with the model, settings and versions behind them."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.manifest import MANIFEST_FILE
from megatron.config.model_size import count_parameters
from megatron.config.sections.evaluation import EvaluationConfig
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.reading import ReadingConfig
from megatron.config.sections.run_config import RunConfig
from megatron.errors import ConfigError, DataError, os_errors_as
from megatron.io.durable import atomic_write
from megatron.io.hashing import file_sha256
from megatron.monitor.provenance import device_name, git_commit

PACKAGES = ("lm_eval", "torch", "transformers", "datasets", "tokenizers", "numpy")


def describe_checkpoint(checkpoint: Checkpoint, model: ModelConfig, reading: ReadingConfig | None) -> dict[str, Any]:
    """Describes the model that was read of a checkpoint of ours."""
    state, part = checkpoint.state, "" if reading is None else reading.title
    return {
        "name": f"{checkpoint.path.resolve().parent.name}/{checkpoint.path.name}" + (f" {part}" if part else ""),
        "kind": "checkpoint",
        "path": str(checkpoint.path),
        "iteration": state.iteration,
        "tokens": state.consumed_train_samples * checkpoint.config.model.seq_length,
        "parameters": count_parameters(model, state.padded_vocab_size),
        "run_id": checkpoint.manifest.run_id,
        "manifest_sha256": file_sha256(checkpoint.path / MANIFEST_FILE),
        "trained_with": checkpoint.manifest.versions,
    }


def describe_evaluation(run: RunConfig, ranks: dict[str, int], dtype: str, max_length: int) -> dict[str, Any]:
    """Describes the settings and the machine that scored a model."""
    return {
        "eval_tasks": run.evaluation.tasks,
        "num_fewshot": run.evaluation.num_fewshot,
        "limit": run.evaluation.task_limit,
        "batch_size": run.evaluation.batch_size,
        "dtype": dtype,
        "max_length": max_length,
        "ranks": ranks,
        "device": device_name(),
    }


def complete_record(
    found: dict[str, Any], model: dict[str, Any], how: dict[str, Any], run: RunConfig, seconds: float
) -> dict[str, Any]:
    """Returns the content of a results file: lm-eval's own fields, and the model, settings and versions behind them."""
    return {
        **found,
        "model": model,
        "config": how,
        "run_config": run.model_dump(mode="json"),
        "git_hash": git_commit(),
        "packages": {package: version(package) for package in PACKAGES},
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "total_evaluation_time_seconds": seconds,
    }


def results_file(config: EvaluationConfig, what: str, suffix: str = ".json") -> Path:
    """Returns the configured file of results, or a file named after `what` and the time in the configured folder.

    Raises ConfigError when the folder cannot be made.
    """
    output = Path(config.output)
    path = output
    if output.suffix != ".json":
        safe = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in what)
        prefix = f"{config.results_prefix}_" if config.results_prefix else ""
        path = output / f"{prefix}{safe}_{time.strftime('%Y-%m-%dT%H-%M-%S')}{suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"eval_output: {path.parent} cannot be made ({error.strerror}). Name a folder that you may write to."
        ) from error
    return path


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a results file, whole or not at all. Raises DataError where it cannot be written."""
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(record, indent=1, default=handle_non_serializable, ensure_ascii=False)
    with os_errors_as(DataError, str(path)), atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
