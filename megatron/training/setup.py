"""Assembles a training run, from configuration to last checkpoint, in the order in which things need each other."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron.checkpointing.states.same_model import require_same_vocabulary
from megatron.checkpointing.store.checkpoint import require_writable
from megatron.checkpointing.store.run_state import RunState
from megatron.config.deepspeed_json import deepspeed_config
from megatron.config.model_size import count_parameters
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import BatchConfig
from megatron.data.data_fingerprint import data_fingerprint
from megatron.data.datasets import SampleCounts, build_datasets, sample_counts
from megatron.data.tokenizer import build_tokenizer, padded_vocab_size
from megatron.errors import STOPPED_ON_REQUEST, EnvironmentSetupError
from megatron.model.causal_lm import VocabSize
from megatron.model.pipeline import build_pipeline
from megatron.model.speedups import Speedups, apply_speedups, choose_speedups
from megatron.mpu.agreement import on_first_rank
from megatron.mpu.context import ParallelContext
from megatron.mpu.process_group import process_group, share_with_deepspeed
from megatron.training.batch_reader import BatchReader
from megatron.training.loop import Ending
from megatron.training.lr_schedules import LRScheduler
from megatron.training.optimizer import build_optimizer
from megatron.training.run import Run, run_from
from megatron.training.run_record import describe_run
from megatron.training.run_start import Start, adopt_schedule, find_start, require_same_data
from megatron.training.stability.deepspeed_repairs import repair
from megatron.training.stability.step_guard import StepGuard
from megatron.training.stop_request import StopRequest, signals_request

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

logger = logging.getLogger(__name__)


def pretrain(config: RunConfig, batch: BatchConfig, run_folder: Path) -> int:
    """Train as configured on the ranks that the environment announces; returns the exit code.

    That is 0 after the last step, and STOPPED_ON_REQUEST when a signal or a limit has ended the run after saving it; 1
    when it has nowhere to save.
    Raises EnvironmentSetupError, CheckpointError and DataError for what the user can repair, before the first step
    wherever that is possible, and NonFiniteError for NaN and infinity.
    """
    stop = StopRequest(config.training.exit_duration_in_mins)
    with signals_request(stop):
        require_hardware(config)
        if config.checkpoint.save is not None:
            require_writable(Path(config.checkpoint.save))
        with process_group():
            share_with_deepspeed()
            ending = pretrain_in_group(config, batch, run_folder, stop)
    if ending is not Ending.STOPPED:
        return 0
    if config.checkpoint.save is None:
        logger.info("stopped on request; nothing is saved, for `save` is not set")
        return 1
    logger.info("stopped on request, and saved: start again to go on (exit code %d)", STOPPED_ON_REQUEST)
    return STOPPED_ON_REQUEST


def pretrain_in_group(
    config: RunConfig, batch: BatchConfig, run_folder: Path, stop: StopRequest | None = None
) -> Ending:
    """`pretrain` on the ranks of the process group that exists already; without `stop`, no signal ends it."""
    parallel = config.parallel
    context = ParallelContext.create(
        parallel.model_parallel_size, parallel.pipe_parallel_size, parallel.sequence_parallel
    )
    start = find_start(config)
    logger.info("%s", start)
    config = adopt_schedule(config, start)
    tokenizer = build_tokenizer(config.data.tokenizer)
    vocab = VocabSize(tokenizer.vocab_size, padded_vocab_size(config.model, tokenizer.vocab_size))
    if start.checkpoint is not None:
        require_same_vocabulary(start.checkpoint, vocab, padding_is_masked=config.model.mask_padded_vocab)
    counts = index_counts(config, batch, start)
    sizes = {"seq_length": config.model.seq_length, "seed": config.training.seed}
    datasets = build_datasets(config.data, counts, **sizes, vocab_size=vocab.padded)
    fingerprint = on_first_rank(lambda: data_fingerprint(config.data, **sizes))
    require_same_data(start, fingerprint, config.checkpoint)
    engine = build_engine(config, batch, vocab, context)
    run = Run(
        config=config,
        batch=batch,
        engine=engine,
        guard=StepGuard(engine, context, config.training.precision, stop or StopRequest()),
        datasets=datasets,
        reader=BatchReader(
            batch, context, config.data.num_workers, tokenizer.eod if config.data.eod_mask_loss else None
        ),
        state=initial_state(counts, fingerprint, vocab, context),
        description=describe_run(config, batch, vocab, run_folder.name, count_parameters(config.model, vocab.padded)),
        folder=run_folder,
    )
    return run_from(run, start)


def require_hardware(config: RunConfig) -> Speedups:
    """The speed-ups to use on this machine.

    Raises EnvironmentSetupError when it cannot compute in the configured number format, or lacks a speed-up that is on.
    """
    on_gpu = torch.cuda.is_available()
    if config.training.precision.dtype == "fp16" and not on_gpu:
        raise EnvironmentSetupError(
            "fp16 needs a GPU, and torch sees none. On a CPU use `precision: bfloat16` or `precision: fp32` in place "
            "of the `fp16` block."
        )
    return choose_speedups(config.speedups, config.training.precision, on_gpu=on_gpu)


def index_counts(config: RunConfig, batch: BatchConfig, start: Start) -> SampleCounts:
    """Samples that the dataset indices are built for: those of the resumed run, whatever train_iters is now."""
    counts = sample_counts(config.training, batch.global_batch_size)
    if start.checkpoint is None or not start.continues:
        return counts
    saved = start.checkpoint.state
    if counts.train > saved.train_index_samples:
        logger.warning(
            "train_iters asks for %d samples, and the data order of this run was made for %d: after those it starts "
            "over from its beginning",
            counts.train,
            saved.train_index_samples,
        )
    return SampleCounts(saved.train_index_samples, saved.valid_index_samples, counts.test)


def build_engine(config: RunConfig, batch: BatchConfig, vocab: VocabSize, context: ParallelContext) -> PipelineEngine:
    """Model, optimizer and schedule in DeepSpeed's pipeline engine."""
    import deepspeed

    speedups = require_hardware(config)
    logger.info("speed-ups: %s", speedups)
    # PipelineModule and its engine print to standard output what only their authors need.
    with contextlib.redirect_stdout(io.StringIO()):
        module = build_pipeline(
            config.model,
            vocab,
            config.parallel,
            context,
            seed=config.training.seed,
            checkpointed=config.training.checkpoint_activations,
        )
        apply_speedups(module, speedups)
        optimizer = build_optimizer(module, config.training.optimizer, speedups.optimizer)
        scheduler = LRScheduler(
            optimizer,
            peak=config.training.optimizer.lr,
            schedule=config.training.lr_schedule,
            train_iters=config.training.train_iters,
        )
        engine, _, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=scheduler, config=deepspeed_config(config, batch)
        )
    repair(engine, context)
    return engine


def initial_state(
    counts: SampleCounts, fingerprint: dict[str, str], vocab: VocabSize, context: ParallelContext
) -> RunState:
    """The state of a run before its first step; what a checkpoint adds is progress."""
    return RunState(
        iteration=0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        schedule_steps=0,
        non_finite_steps=0,
        train_index_samples=counts.train,
        valid_index_samples=counts.valid,
        data_fingerprint=fingerprint,
        tensor_parallel_size=context.tensor_size,
        pipe_parallel_size=context.pipe_size,
        data_parallel_size=context.data_size,
        vocab_size=vocab.actual,
        padded_vocab_size=vocab.padded,
    )
