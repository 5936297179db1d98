"""Assembles a training run, from configuration to last checkpoint, in the order in which things need each other."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron.checkpointing.folder import RunState, require_writable
from megatron.checkpointing.save_load import load_checkpoint
from megatron.checkpointing.schedule import save_iterations
from megatron.config.deepspeed import deepspeed_config
from megatron.config.parameters import count_parameters
from megatron.config.run import RunConfig
from megatron.config.training import BatchConfig
from megatron.data.datasets import Datasets, SampleCounts, build_datasets, sample_counts
from megatron.data.tokenizer import build_tokenizer, padded_vocab_size
from megatron.errors import EnvironmentSetupError
from megatron.model.causal_lm import VocabSize
from megatron.model.pipeline import build_pipeline
from megatron.model.speedups import Speedups, apply_speedups, choose_speedups
from megatron.monitor.throughput import Throughput, TimedIterator
from megatron.monitor.writers import Monitor
from megatron.mpu.context import ParallelContext
from megatron.training.batch_hashes import LogBatchHashes
from megatron.training.batches import BatchReader
from megatron.training.callbacks import LogMetrics, SaveCheckpoints, Validate
from megatron.training.deepspeed_repairs import repair
from megatron.training.distributed import process_group
from megatron.training.evaluate import evaluate, loss_metrics
from megatron.training.loop import train
from megatron.training.lr_schedules import LRScheduler
from megatron.training.optimizer import build_optimizer
from megatron.training.progress import Callback
from megatron.training.record import describe_run, open_record
from megatron.training.resume import Start, adopt_schedule, find_start, require_same_vocabulary

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

logger = logging.getLogger(__name__)


def pretrain(config: RunConfig, batch: BatchConfig, run_folder: Path) -> int:
    """Train as configured on the ranks that the environment announces; returns the exit code.

    Raises EnvironmentSetupError, CheckpointError and DataError for what the user can repair, before the first step
    wherever that is possible.
    """
    require_hardware(config)
    if config.checkpoint.save is not None:
        require_writable(Path(config.checkpoint.save))
    with process_group():
        pretrain_in_group(config, batch, run_folder)
    return 0


def pretrain_in_group(config: RunConfig, batch: BatchConfig, run_folder: Path) -> None:
    """`pretrain` on the ranks of the process group that exists already."""
    parallel = config.parallel
    context = ParallelContext.create(
        parallel.model_parallel_size, parallel.pipe_parallel_size, parallel.sequence_parallel
    )
    start = find_start(config, context)
    config = adopt_schedule(config, start)
    tokenizer = build_tokenizer(config.data.tokenizer)
    vocab = VocabSize(tokenizer.vocab_size, padded_vocab_size(config.model, tokenizer.vocab_size))
    require_same_vocabulary(start, vocab)
    counts = index_counts(config, batch, start)
    datasets = build_datasets(
        config.data, counts, seq_length=config.model.seq_length, seed=config.training.seed, vocab_size=vocab.padded
    )
    engine = build_engine(config, batch, vocab, context)
    if start.checkpoint is not None:
        load_checkpoint(
            engine,
            start.checkpoint,
            optimizer=start.continues and not config.checkpoint.no_load_optim,
            lr_schedule=start.continues,
        )
    reader = BatchReader(batch, context, config.data.num_workers, tokenizer.eod if config.data.eod_mask_loss else None)
    description = describe_run(config, batch, vocab, run_folder.name, count_parameters(config.model, vocab.padded))
    with open_record(config, description, run_folder, iteration=start.iteration) as (monitor, throughput):
        state = initial_state(counts, vocab, context)
        run(config, batch, engine, datasets, reader, start, state, monitor, throughput, run_folder)


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


def initial_state(counts: SampleCounts, vocab: VocabSize, context: ParallelContext) -> RunState:
    """The state of a run before its first step; what a checkpoint adds is progress."""
    return RunState(
        iteration=0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        train_index_samples=counts.train,
        valid_index_samples=counts.valid,
        tensor_parallel_size=context.tensor_size,
        pipe_parallel_size=context.pipe_size,
        data_parallel_size=context.data_size,
        vocab_size=vocab.actual,
        padded_vocab_size=vocab.padded,
    )


def run(
    config: RunConfig,
    batch: BatchConfig,
    engine: PipelineEngine,
    datasets: Datasets,
    reader: BatchReader,
    start: Start,
    state: RunState,
    monitor: Monitor,
    throughput: Throughput,
    run_folder: Path,
) -> None:
    """The steps with what happens around them, then the final test."""
    training = config.training
    progress = start.progress()
    batches = reader.read(datasets.train, progress.consumed_train_samples)
    callbacks: list[Callback] = []
    if config.monitor.log_batch_hashes:
        batches = hashes = LogBatchHashes(batches, reader.context, run_folder, progress.iteration)
        callbacks.append(hashes)
    train_batches = TimedIterator(batches)
    if datasets.valid is not None and training.eval_iters > 0:
        valid_batches = reader.read(datasets.valid, progress.consumed_valid_samples)
        callbacks.append(Validate(engine, valid_batches, progress, training, batch.global_batch_size, throughput))
    callbacks.append(LogMetrics(engine, monitor, throughput, train_batches, config.monitor.log_interval))
    if config.checkpoint.save is not None:
        iterations = save_iterations(config.checkpoint, training.train_iters)
        callbacks.append(SaveCheckpoints(engine, iterations, progress, state, config, throughput))
    train(engine, train_batches, progress, training, batch.global_batch_size, reader.context, callbacks)
    if datasets.test is not None and training.eval_iters > 0:
        loss = evaluate(engine, reader.read(datasets.test, 0), training.eval_iters)
        monitor.write(progress.iteration, loss_metrics("test", loss))
