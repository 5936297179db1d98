"""Scores checkpoints, or a Hugging Face model, on tasks of lm-eval, and writes the results. Needs lm-eval.

Rank 0 runs the harness; the other ranks answer (ranks.py).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import evaluate

from megatron.checkpointing.store.checkpoint import checkpoint_name, checkpoint_paths, read_checkpoint
from megatron.checkpointing.store.manifest import MANIFEST_FILE
from megatron.config.sections.run_config import RunConfig
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import CheckpointError, ConfigError
from megatron.inference.evaluation.harness.answer_cache import AnswerCache
from megatron.inference.evaluation.harness.answers import Answers
from megatron.inference.evaluation.harness.harness_model import HarnessModel
from megatron.inference.evaluation.harness.harness_tasks import SEEDS, Tasks, load_tasks
from megatron.inference.evaluation.learning_curve import curve_rows, write_curve
from megatron.inference.evaluation.results_file import (
    complete_record,
    describe_checkpoint,
    describe_evaluation,
    metrics_of,
    results_file,
    write_record,
)
from megatron.io.hashing import file_sha256
from megatron.loaded_model.workers import Ranks
from megatron.mpu.context import ParallelContext

RESAMPLES = 1000
"""Bootstrap samples behind standard errors that have no formula; lm-eval's 100,000 take longer than small models."""


def evaluate_checkpoints(config: RunConfig, context: ParallelContext, device: torch.device) -> list[Path]:
    """Score the configured checkpoints one after the other; the files that were written, on rank 0.

    Collective. Several checkpoints also give a learning curve (CSV and PNG). Raises ConfigError, DataError and
    CheckpointError before anything is scored where tasks, data or checkpoints are missing.
    """
    answers = Answers(config, build_tokenizer(config.data.tokenizer), context, device)
    with Ranks(context, answers) as ranks:
        if not ranks.first:
            ranks.follow()
            return []
        iterations = _iterations(config)
        tasks = load_tasks(config.evaluation)
        several = len(iterations) > 1
        if several and config.evaluation.output.endswith(".json"):
            raise ConfigError("eval_output: several checkpoints do not go into one .json file. Name a folder.")
        records, files = [], []
        for iteration in iterations:
            ranks.ask("load", [None] * context.data_size, iteration=iteration)
            record = _evaluate_loaded(config, answers, ranks, tasks)
            records.append(record)
            files.append(_write(config, record))
        if several:
            curve = results_file(config.evaluation, "learning_curve", ".csv")
            write_curve(curve_rows(records), curve)
            files += [curve, curve.with_suffix(".png")]
        return files


def evaluate_hf_model(config: RunConfig) -> Path:
    """Score `evaluation.hf_model` with lm-eval's own adapter; the file that was written.

    Raises ConfigError and DataError before anything is scored where the model, tasks or data are missing.
    """
    tasks = load_tasks(config.evaluation)
    from megatron.inference.evaluation.hf_model import describe_hf_model, load_hf_model

    model = load_hf_model(config.evaluation)
    how = describe_evaluation(config, {}, str(model.model.dtype).removeprefix("torch."), model.max_length)
    return _write(config, _run(config, model, tasks, describe_hf_model(config.evaluation, model), how))


def _iterations(config: RunConfig) -> Sequence[int | None]:
    """Steps to score; of several, all are there and can be read. None is the configured or newest checkpoint."""
    wanted = config.evaluation.iterations
    if wanted != "all" and len(wanted) <= 1:
        return wanted or [None]
    folder = Path(config.checkpoint.load or config.checkpoint.save or ".")
    there = sorted(iteration for iteration, _ in checkpoint_paths(folder))
    if not there:
        raise CheckpointError(f"{folder} holds no checkpoint to read. Name a run's folder with `load=...`.")
    steps = there if wanted == "all" else list(dict.fromkeys(wanted))
    missing = [step for step in steps if step not in there]
    if missing:
        raise CheckpointError(
            f"{folder} holds no checkpoint of step {', '.join(map(str, missing))}. Steps there: "
            f"{', '.join(map(str, there))}."
        )
    for step in steps:
        path = folder / checkpoint_name(step)
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}. Name the steps to score, as in `--iteration 1000 2000`."
            ) from error
    return steps


def _evaluate_loaded(config: RunConfig, answers: Answers, ranks: Ranks, tasks: Tasks) -> dict[str, Any]:
    (checkpoint, model), context = answers.loaded, answers.context
    sizes = {"tensor": context.tensor_size, "data": context.data_size}
    dtype = str(model.dtype).removeprefix("torch.")
    what = {"manifest": file_sha256(checkpoint.path / MANIFEST_FILE), "dtype": dtype, "length": model.context_length}
    adapter = HarnessModel(
        ranks.ask,
        answers.tokenizer,
        model.context_length,
        lambda length: answers.limit.rows(length) * context.data_size,
        AnswerCache(_cache_file(config.evaluation.cache, what)),
    )
    how = describe_evaluation(config, sizes, dtype, model.context_length)
    return _run(config, adapter, tasks, describe_checkpoint(checkpoint), how)


def _cache_file(folder: str | None, what: dict[str, Any]) -> Path | None:
    """The file of the answers of one model, computed in one format and context length; they are kept by token ids."""
    if folder is None:
        return None
    return Path(folder) / f"{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]}.jsonl"


def _run(config: RunConfig, model: Any, tasks: Tasks, what: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's evaluation of one model, as a record; prints its table."""
    print(f"evaluating {what['name']}", flush=True)
    tasks.set_seeds()
    start = time.monotonic()
    found = evaluate(
        lm=model,
        task_dict=tasks.content,
        limit=config.evaluation.task_limit,
        bootstrap_iters=RESAMPLES,
        log_samples=False,
    )
    print(table(found["results"]), flush=True)
    how = {**how, **SEEDS, "bootstrap_iters": RESAMPLES}
    return complete_record(found, what, how, config, time.monotonic() - start)


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each task's metric, with one standard error."""
    lines = []
    for (task, metric), (value, error) in sorted(metrics_of(results).items()):
        lines.append(f"  {task:<32} {metric:<24} {value:>12.6g}" + (f" ± {error:.3g}" if error else ""))
    return "\n".join(lines)


def _write(config: RunConfig, record: dict[str, Any]) -> Path:
    path = results_file(config.evaluation, record["model"]["name"])
    write_record(path, record)
    print(f"written: {path}", flush=True)
    return path
