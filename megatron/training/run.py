"""The steps of an assembled run, with what happens around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.checkpointing.engine.loading import load_checkpoint, load_weights
from megatron.checkpointing.engine.save_schedule import save_iterations
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.run_state import RunState
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import BatchConfig
from megatron.data.datasets import Datasets
from megatron.errors import NonFiniteError
from megatron.model.causal_lm import VocabSize
from megatron.monitor.monitor import Monitor
from megatron.monitor.throughput import Throughput, TimedIterator
from megatron.training.batch_hashes import LogBatchHashes
from megatron.training.batch_reader import BatchReader
from megatron.training.callbacks import FinalTest, LogMetrics, SaveCheckpoints, Validate
from megatron.training.loop import Ending, train
from megatron.training.run_record import open_record, recorded_versions
from megatron.training.run_start import Start, roll_back
from megatron.training.stability.step_guard import StepGuard
from megatron.training.step import Callback, Progress

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


@dataclass(frozen=True)
class Run:
    """What does not change from start to end."""

    config: RunConfig
    batch: BatchConfig
    engine: PipelineEngine
    guard: StepGuard
    datasets: Datasets
    reader: BatchReader
    state: RunState
    """What checkpoints say apart from progress."""
    description: dict[str, Any]
    """Content of run.json."""
    folder: Path
    """Where metrics go."""


def run_from(run: Run, start: Start) -> Ending:
    """Take the steps from `start` on, and from the last checkpoint again as often as the policy says so."""
    while True:
        if start.checkpoint is not None:
            _load(run, start, start.checkpoint)
        progress = replace(start.progress)
        with open_record(run.config, run.description, run.folder, iteration=progress.iteration) as (monitor, meter):
            batches = run.reader.read(run.datasets.train, progress.consumed_train_samples)
            ending = _train(run, start.run_id, progress, batches, monitor, meter)
        if ending is not Ending.ROLL_BACK:
            return ending
        start = roll_back(run.config.checkpoint, start, progress)


def _load(run: Run, start: Start, checkpoint: Checkpoint) -> None:
    if start.loads_optimizer:
        vocab = VocabSize(run.state.vocab_size, run.state.padded_vocab_size)
        load_checkpoint(run.engine, checkpoint, run.config, run.reader.context, vocab)
        return
    load_weights(run.engine, checkpoint, run.reader.context)
    if start.continues:
        run.engine.lr_scheduler.load_state_dict({"num_steps": checkpoint.state.schedule_steps})


def _train(
    run: Run, run_id: str, progress: Progress, batches: Iterator[Any], monitor: Monitor, meter: Throughput
) -> Ending:
    config, engine, stop = run.config, run.engine, run.guard.stop
    training = config.training
    callbacks: list[Callback] = []
    if config.monitor.log_batch_hashes:
        batches = hashes = LogBatchHashes(batches, run.reader.context, run.folder, progress.iteration)
        callbacks.append(hashes)
    timed = TimedIterator(batches)
    if run.datasets.valid is not None and training.eval_iters > 0:
        valid_batches = run.reader.read(run.datasets.valid, progress.consumed_valid_samples)
        samples = run.batch.global_batch_size
        callbacks.append(Validate(engine, valid_batches, progress, training, samples, meter, stop))
    if run.datasets.test is not None and training.eval_iters > 0:
        test_batches = run.reader.read(run.datasets.test, 0)
        callbacks.append(FinalTest(engine, test_batches, training.eval_iters, meter, stop))
    interval, length = config.monitor.log_interval, config.model.seq_length
    callbacks.append(LogMetrics(engine, monitor, meter, timed, progress, length, interval, stop))
    saves = None
    if config.checkpoint.save is not None:
        iterations = save_iterations(config.checkpoint, training.train_iters)
        versions = recorded_versions(run.description)
        saves = SaveCheckpoints(
            engine, iterations, progress, run.state, config, meter, stop, run_id=run_id, versions=versions
        )
        callbacks.append(saves)
    with finished(saves):
        return train(engine, timed, progress, training, run.batch, run.guard, run.reader.context, callbacks)


@contextmanager
def finished(saves: SaveCheckpoints | None) -> Iterator[None]:
    """Leave with the last save published, also when all ranks give up on a step that is not finite.

    Any other error may be one rank's alone, which the others would wait for in vain.
    """
    try:
        yield
    except NonFiniteError:
        if saves is not None:
            saves.finish()
        raise
    if saves is not None:
        saves.finish()
