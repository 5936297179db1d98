"""Scores checkpoints, or a Hugging Face model, on tasks of lm-eval, and writes the results. Needs lm-eval.

Rank 0 runs the harness; all ranks compute.
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

from megatron.checkpointing.store.checkpoint import checkpoint_name, read_checkpoint
from megatron.checkpointing.store.fetch import steps_of
from megatron.checkpointing.store.manifest import MANIFEST_FILE
from megatron.config.local_path import is_url
from megatron.config.sections.run_config import RunConfig
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import CheckpointError, ConfigError
from megatron.inference.evaluation.harness.evaluation_worker import EvaluationWorker
from megatron.inference.evaluation.harness.harness_model import HarnessModel
from megatron.inference.evaluation.harness.harness_tasks import SEEDS, HarnessTasks, load_tasks
from megatron.inference.evaluation.harness.resampling import without_forks
from megatron.inference.evaluation.harness.response_cache import ResponseCache
from megatron.inference.evaluation.learning_curve import curve_rows, write_curve
from megatron.inference.evaluation.results_file import (
    complete_record,
    describe_checkpoint,
    describe_evaluation,
    results_file,
    write_record,
)
from megatron.inference.evaluation.sample_log import Samples, task_hashes, write_samples
from megatron.io.hashing import file_sha256
from megatron.loaded_model.rank_pool import RankPool
from megatron.monitor.evaluation_metrics import metrics_of
from megatron.mpu.context import ParallelContext


def evaluate_checkpoints(config: RunConfig, context: ParallelContext, device: torch.device) -> list[Path]:
    """Scores the configured checkpoints one after the other; returns the files that were written, on rank 0.

    Collective. Several checkpoints also give a learning curve (CSV and PNG). Raises ConfigError, DataError and
    CheckpointError before anything is scored where tasks, data or checkpoints are missing.
    """
    worker = EvaluationWorker(config, build_tokenizer(config.data.tokenizer), context, device)
    with RankPool(context, worker) as pool:
        if not pool.is_driver:
            pool.serve()
            return []
        iterations = _iterations(config)
        tasks = load_tasks(config.evaluation)
        several = len(iterations) > 1
        if several and config.evaluation.output.endswith(".json"):
            raise ConfigError("eval_output: several checkpoints do not go into one .json file. Name a folder.")
        records, files = [], []
        for iteration in iterations:
            pool.request("load", [None] * context.data_size, iteration=iteration)
            record, samples = _evaluate_loaded(config, worker, pool, tasks)
            records.append(record)
            files.append(_write(config, record, samples))
        if several:
            curve = results_file(config.evaluation, "learning_curve", ".csv")
            write_curve(curve_rows(records), curve)
            files += [curve, curve.with_suffix(".png")]
        return files


def evaluate_hf_model(config: RunConfig) -> Path:
    """Scores `evaluation.hf_model` with lm-eval's own adapter; returns the file that was written.

    Raises ConfigError and DataError before anything is scored where the model, tasks or data are missing.
    """
    tasks = load_tasks(config.evaluation)
    from megatron.inference.evaluation.huggingface_model import describe_hf_model, load_hf_model

    model = load_hf_model(config.evaluation)
    how = describe_evaluation(config, {}, str(model.model.dtype).removeprefix("torch."), model.max_length)
    return _write(config, *_run(config, model, tasks, describe_hf_model(config.evaluation, model), how))


def _iterations(config: RunConfig) -> Sequence[int | None]:
    """Returns the steps to score; None is the configured or newest checkpoint.

    Raises CheckpointError unless each of several is there and can be read.
    """
    wanted = config.evaluation.iterations
    if wanted != "all" and len(wanted) <= 1:
        return wanted or [None]
    folder = config.checkpoint.load or config.checkpoint.save or "."
    there = steps_of(folder)
    if not there:
        raise CheckpointError(f"{folder} holds no checkpoint to read. Name a run's folder with `load=...`.")
    steps = there if wanted == "all" else list(dict.fromkeys(wanted))
    missing = [step for step in steps if step not in there]
    if missing:
        raise CheckpointError(
            f"{folder} holds no checkpoint of step {', '.join(map(str, missing))}. Steps there: "
            f"{', '.join(map(str, there))}."
        )
    # In a store, what has a manifest is whole.
    for step in [] if is_url(folder) else steps:
        path = Path(folder) / checkpoint_name(step)
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}. Name the steps to score, as in `--iteration 1000 2000`."
            ) from error
    return steps


def _evaluate_loaded(
    config: RunConfig, worker: EvaluationWorker, pool: RankPool, tasks: HarnessTasks
) -> tuple[dict[str, Any], Samples]:
    (checkpoint, model), context = worker.loaded, worker.context
    sizes = {"tensor": context.tensor_size, "data": context.data_size}
    dtype = str(model.dtype).removeprefix("torch.")
    what = {"manifest": file_sha256(checkpoint.path / MANIFEST_FILE), "dtype": dtype, "length": model.context_length}
    reading = config.reading
    if reading is not None and reading.title:
        what["reading"] = reading.title
    adapter = HarnessModel(
        pool.request,
        worker.prompt_tokenizer,
        model.context_length,
        lambda length: worker.limit.sequences(length) * context.data_size,
        ResponseCache(_cache_file(config.evaluation.cache, what)),
    )
    how = describe_evaluation(config, sizes, dtype, model.context_length)
    return _run(config, adapter, tasks, describe_checkpoint(checkpoint, model.config, reading), how)


def _cache_file(folder: str | None, what: dict[str, Any]) -> Path | None:
    """Returns the file of the responses of one model in one format and context length; they are kept by token ids."""
    if folder is None:
        return None
    return Path(folder) / f"{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]}.jsonl"


def _run(
    config: RunConfig, model: Any, tasks: HarnessTasks, what: dict[str, Any], how: dict[str, Any]
) -> tuple[dict[str, Any], Samples]:
    """Runs lm-eval's evaluation of one model, prints its table; returns the record, and the samples if logged."""
    print(f"evaluating {what['name']}", flush=True)
    tasks.set_seeds()
    start = time.monotonic()
    with without_forks():
        found = evaluate(
            lm=model,
            task_dict=tasks.content,
            limit=config.evaluation.task_limit,
            bootstrap_iters=config.evaluation.bootstrap_iters,
            log_samples=config.evaluation.log_samples,
        )
    samples: Samples = found.pop("samples", None) or {}
    if samples:
        found["task_hashes"] = task_hashes(samples)
    print(metrics_table(found["results"]), flush=True)
    how = {**how, **SEEDS, "bootstrap_iters": config.evaluation.bootstrap_iters}
    return complete_record(found, what, how, config, time.monotonic() - start), samples


def metrics_table(results: dict[str, dict[str, Any]]) -> str:
    """Renders a line for each task's metric, with one standard error."""
    lines = []
    for (task, metric), (value, error) in sorted(metrics_of(results).items()):
        lines.append(f"  {task:<32} {metric:<24} {value:>12.6g}" + (f" ± {error:.3g}" if error else ""))
    return "\n".join(lines)


def _write(config: RunConfig, record: dict[str, Any], samples: Samples) -> Path:
    path = results_file(config.evaluation, record["model"]["name"])
    write_record(path, record)
    print(f"written: {path}", flush=True)
    for file in write_samples(samples, path):
        print(f"written: {file}", flush=True)
    return path
