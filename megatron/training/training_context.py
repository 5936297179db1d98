"""Assembled run, and the context that its callbacks share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.checkpointing.store.run_state import RunState
from megatron.config.run_yaml import RUN_YAML, GivenConfiguration, write_run_yaml
from megatron.config.sections.grow import GrowConfig
from megatron.config.sections.growth import GrowthRecord
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import BatchConfig
from megatron.data.datasets import SampleCounts
from megatron.growth.grow_checkpoint import tokens_read
from megatron.model.causal_lm import VocabSize
from megatron.monitor.event_log import EventLog
from megatron.monitor.monitor import Monitor, build_monitor
from megatron.monitor.throughput import Throughput
from megatron.mpu.agreement import on_first_rank
from megatron.mpu.context import ParallelContext
from megatron.planner.devices import peak_flops
from megatron.training.after_growth import AfterGrowth
from megatron.training.distillation.distillation import Distillation
from megatron.training.elastic.elastic_training import ElasticTraining
from megatron.training.gradients.weight_gathering import WeightGathering
from megatron.training.growth_event import growth_event
from megatron.training.hangs.watchdog import Watchdog
from megatron.training.progress import Progress
from megatron.training.run_description import write_description
from megatron.training.run_lease import RunLease
from megatron.training.stability.step_guard import StepGuard
from megatron.training.step_parts import StepParts
from megatron.training.stop_request import StopRequest
from megatron.training.training_data import TrainingData

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingRun:
    """Parts of a run that stay the same from its first step to its last."""

    config: RunConfig
    batch: BatchConfig
    parallel: ParallelContext
    vocab: VocabSize
    data: TrainingData
    engine: PipelineEngine
    guard: StepGuard
    """Guards the engine's steps, and carries requests to stop."""
    after_growth: AfterGrowth
    """What the rules of the last growth do at each step."""
    weights: WeightGathering
    """The engine's weights, on their way between ranks after a step."""
    distillation: Distillation | None
    """Teacher of the run; None for a run that learns from its text alone."""
    elastic: ElasticTraining | None
    """Shares that the steps read; None for a run whose steps all read the whole model."""
    growth: tuple[GrowthRecord, ...]
    """Growths of the model so far."""
    next_growth: GrowConfig | None
    """The growth that is still to come, at one of the steps; the run is assembled anew then."""
    run_id: str
    """The run that its checkpoints belong to."""
    description: dict[str, Any]
    """Content of run.json."""
    given: GivenConfiguration
    """Configuration as the run is to keep it, in run.yml."""
    folder: Path
    """Folder of run.json and metrics."""
    lease: RunLease
    """Keeps other processes from writing the run's folders."""
    event_log: EventLog
    """Takes what happens to the run, on rank 0."""
    watchdog: Watchdog
    """Times the steps, and notices one that will not end."""
    parts: StepParts
    """Parts of the engine's steps, for who wants to see them."""

    @property
    def step_flops(self) -> float:
        """Returns the work of the step that was begun last, forward and backward, without recomputation [FLOP]."""
        further = 0 if self.elastic is None else self.elastic.further_flops
        flops: float = (self.description["flops_per_token"] + further) * self.description["tokens_per_step"]
        return flops

    def describe(self) -> None:
        """Writes run.json into the run's folder, and run.yml there and beside the checkpoints.

        Raises EnvironmentSetupError where a file cannot be written.
        """
        write_description(self.description, self.folder)
        if not self.given.keys:
            return
        text = self.given.text()
        for folder in {Path(folder).resolve() for folder in (self.folder, self.config.checkpoint.save or self.folder)}:
            if not write_run_yaml(text, folder):
                logger.warning("%s: somebody's own file, which stays as it is", folder / RUN_YAML)


@dataclass(frozen=True)
class TrainingContext:
    """Run as callbacks see it, from a start to the end or to a rollback."""

    run: TrainingRun
    progress: Progress
    """Place of the run; the loop counts steps and training samples, callbacks what they read themselves."""
    monitor: Monitor
    """Takes the metrics on rank 0; does nothing on other ranks."""
    throughput: Throughput
    """Runs since the start, and is paused for what is not training."""

    @property
    def stop(self) -> StopRequest:
        """Returns the requests to end the run early."""
        return self.run.guard.stop

    def run_state(self) -> RunState:
        """Returns the state of the run that a checkpoint holds."""
        run = self.run
        state = initial_run_state(run.data.counts, run.data.fingerprint, run.vocab, run.parallel)
        return replace(
            state,
            **asdict(self.progress),
            schedule_steps=run.engine.lr_scheduler.num_steps,
            growth=run.growth,
            teacher=None if run.distillation is None else run.description["teacher"]["sha256"],
        )

    @property
    def consumed_tokens(self) -> int:
        """Returns the training tokens read so far, also before a growth that restarted the data [tokens]."""
        return tokens_read(self.run_state(), self.run.config.model.seq_length)


@contextmanager
def open_training_context(run: TrainingRun, progress: Progress) -> Iterator[TrainingContext]:
    """Opens the metric writers and describes the run, on rank 0, starts the clock, and closes the writers at the end.

    Collective. Raises what `build_monitor` and `TrainingRun.describe` raise, on all ranks.
    """
    description, training = run.description, run.config.training
    opened: list[Monitor] = []

    def open_monitor() -> None:
        monitor = build_monitor(
            run.config.monitor,
            run.folder,
            rank=0,
            run_name=description["name"],
            total_iterations=training.train_iters,
            resume_iteration=progress.iteration,
            config_dump=description["config"],
        )
        opened.append(monitor)

    on_first_rank(open_monitor)
    with opened[0] if opened else Monitor() as monitor, run.lease.describing(run.describe):
        peak = peak_flops(description["device"], training.precision.dtype)
        further = 0 if run.elastic is None else run.elastic.mean_further_flops
        throughput = Throughput(
            tokens_per_step=description["tokens_per_step"],
            iteration=progress.iteration,
            total_iterations=training.train_iters,
            flops_per_token=description["flops_per_token"] + further,
            peak_flops=None if peak is None else peak * description["ranks"],
        )
        last = run.growth[-1] if run.growth else None
        if last is not None and last.iteration == progress.iteration:
            event = growth_event(last, run.config.model, run.vocab.padded, progress.training_flops)
            on_first_rank(partial(monitor.mark, event))
            on_first_rank(partial(run.event_log.note, event))
        yield TrainingContext(run, progress, monitor, throughput)


def initial_run_state(
    counts: SampleCounts, fingerprint: dict[str, str], vocab: VocabSize, context: ParallelContext
) -> RunState:
    """Returns the state of a run before its first step; progress is what changes in it."""
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
