"""Trains a model: assembles the run in the order in which its parts need each other, and takes its steps."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from megatron.checkpointing.states.same_model import described_model, require_same_vocabulary
from megatron.checkpointing.store.uploads import send_leftovers
from megatron.config.run_yaml import NOTHING_GIVEN, GivenConfiguration
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import BatchConfig
from megatron.data.tokenizer import build_tokenizer, padded_vocab_size
from megatron.errors import STOPPED_ON_REQUEST
from megatron.model.causal_lm import VocabSize
from megatron.monitor.event_log import EventLog
from megatron.mpu.agreement import on_first_rank, on_first_rank_meanwhile
from megatron.mpu.collective_trace import CollectiveTrace
from megatron.mpu.context import ParallelContext
from megatron.mpu.process_group import limit_all_groups, process_group
from megatron.training.build_engine import build_engine, release_engine, require_hardware
from megatron.training.callback import Callback
from megatron.training.callbacks.batch_hashes import BatchHashes
from megatron.training.callbacks.checkpoints import Checkpoints
from megatron.training.callbacks.communication import Communication
from megatron.training.callbacks.evaluation import FinalTest, Validation
from megatron.training.callbacks.metrics import Metrics
from megatron.training.callbacks.profiling import Profile
from megatron.training.callbacks.run_events import RunEvents, note_start
from megatron.training.callbacks.run_folder import RunFolder
from megatron.training.callbacks.samples import Samples
from megatron.training.distillation.find_teacher import find_teacher, require_same_teacher
from megatron.training.grow_run import grow_start, inherit_start
from megatron.training.hangs.watchdog import Watchdog, watched
from megatron.training.loop import Ending, train_steps
from megatron.training.run_description import describe_run
from megatron.training.run_lease import RunLease, run_lease
from megatron.training.run_start import RunStart, adopt_schedule, find_start, load_start, newest_start, roll_back
from megatron.training.stability.deepspeed_patches import join_process_group
from megatron.training.stability.deepspeed_version import compare_unknown, refuse_known_faults
from megatron.training.step_parts import StepParts
from megatron.training.stop_request import StopRequest, signals_request
from megatron.training.training_context import TrainingContext, TrainingRun, open_training_context
from megatron.training.training_data import build_training_data

logger = logging.getLogger(__name__)


def pretrain(config: RunConfig, batch: BatchConfig, run_folder: Path, given: GivenConfiguration = NOTHING_GIVEN) -> int:
    """Trains as configured on the ranks that the environment announces; returns the exit code.

    `given` is the configuration as the run is to keep it. The code is 0 after the last step,
    STOPPED_ON_REQUEST when a signal or a limit has ended the run after saving it, and 1 when the run was stopped and
    has nowhere to save.
    Raises SystemExit with STOPPED_ON_REQUEST where a signal comes before the first step. Raises EnvironmentSetupError,
    CheckpointError and DataError for what the user can repair, before the first step wherever that is possible, and
    NonFiniteError for NaN and infinity.
    """
    stop = StopRequest(config.training.exit_duration_in_mins)
    with signals_request(stop):
        require_hardware(config)
        refuse_known_faults(config.parallel.pipe_parallel_size)
        with (
            process_group(timedelta(minutes=config.watchdog.distributed_timeout_minutes)) as trace,
            watched(config.watchdog, run_folder, stop, trace) as watchdog,
        ):
            join_process_group()
            stop.early.connect()
            on_first_rank(partial(compare_unknown, config.parallel.pipe_parallel_size))
            with run_lease(config.checkpoint, run_folder, stop) as lease:
                ending = pretrain_in_group(config, batch, run_folder, stop, lease, given, watchdog)
    if ending is not Ending.STOPPED:
        return 0
    if config.checkpoint.save is None:
        logger.info("stopped on request; nothing is saved, for `save` is not set")
        return 1
    logger.info("stopped on request, and saved: start again to go on (exit code %d)", STOPPED_ON_REQUEST)
    return STOPPED_ON_REQUEST


def pretrain_in_group(
    config: RunConfig,
    batch: BatchConfig,
    run_folder: Path,
    stop: StopRequest | None = None,
    lease: RunLease | None = None,
    given: GivenConfiguration = NOTHING_GIVEN,
    watchdog: Watchdog | None = None,
) -> Ending:
    """Trains on the ranks of the process group that exists already.

    Takes the steps from the start on, and again from a checkpoint as often as the policy for NaN and infinity says so.
    A run whose model grows is saved then, and assembled once more. Without `stop`, no signal ends the run; without
    `lease`, the caller sees to it that nobody else writes its folders; without `watchdog`, nobody notices a hang.
    """
    sizes = config.parallel
    parallel = ParallelContext.create(sizes.model_parallel_size, sizes.pipe_parallel_size, sizes.sequence_parallel)
    stop = stop or StopRequest()
    watchdog = watchdog or Watchdog(config.watchdog, run_folder, stop, CollectiveTrace())
    start = find_start(config)
    if start.goes_on and start.progress.iteration >= config.training.train_iters:
        done, asked = start.progress.iteration, config.training.train_iters
        logger.info("nothing to do, %d of %d steps are done; a higher train_iters goes on", done, asked)
        on_first_rank_meanwhile(partial(send_leftovers, config.checkpoint))
        return Ending.FINISHED
    run: TrainingRun | None = None
    while True:
        if run is None:
            if start.due is not None and start.continues:
                start = grow_start(config, start, parallel)
            elif start.inherits is not None and start.continues:
                start = inherit_start(config, start, parallel)
            logger.info("%s", start)
            adopted = adopt_schedule(config, start)
            watchdog.begin_anew()
            run = assemble(adopted, batch, parallel, run_folder, start, stop, lease or RunLease(), given, watchdog)
            limit_all_groups(timedelta(minutes=config.watchdog.distributed_timeout_minutes))
        load_start(start, run.engine, run.config, run.parallel, run.vocab)
        progress = replace(start.progress)
        with open_training_context(run, progress) as context:
            note_start(run, start)
            ending = train_steps(context, build_callbacks(context))
        if ending is Ending.ROLL_BACK:
            start = roll_back(run.config.checkpoint, start, progress)
        elif ending is Ending.GROW:
            release_engine(run.engine)
            # What is left of the smaller model's engine goes in circles, and its memory is needed.
            run = None
            del context
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            start = newest_start(config, start.run_id)
        else:
            return ending


def assemble(
    config: RunConfig,
    batch: BatchConfig,
    parallel: ParallelContext,
    run_folder: Path,
    start: RunStart,
    stop: StopRequest,
    lease: RunLease | None = None,
    given: GivenConfiguration = NOTHING_GIVEN,
    watchdog: Watchdog | None = None,
) -> TrainingRun:
    """Builds the parts of a run that stay the same from its start to its end, or to its growth. Collective."""
    next_growth = config.grow if config.grow is not None and config.grow.happens_in_training else None
    if start.checkpoint is not None and start.continues:
        model = described_model(config, start.checkpoint)
        if model is not config.model:
            config, next_growth = config.model_copy(update={"model": model}), None
    tokenizer = build_tokenizer(config.data.tokenizer)
    vocab = VocabSize(tokenizer.vocab_size, padded_vocab_size(config.model, tokenizer.vocab_size))
    if start.checkpoint is not None:
        require_same_vocabulary(start.checkpoint, vocab, padding_is_masked=config.model.mask_padded_vocab)
    teacher = find_teacher(config, config.checkpoint.verify_checkpoint)
    if start.checkpoint is not None and start.continues:
        require_same_teacher(teacher, start.checkpoint, config.distillation)
    data = build_training_data(config, batch, start, tokenizer, vocab, parallel)
    last_growth = start.growth[-1] if start.growth else None
    built = build_engine(config, batch, vocab, parallel, stop, last_growth, teacher)
    return TrainingRun(
        config,
        batch,
        parallel,
        vocab,
        data,
        built.engine,
        built.guard,
        built.after_growth,
        built.weights,
        built.distillation,
        built.elastic,
        start.growth,
        next_growth,
        start.run_id,
        describe_run(config, batch, vocab, run_folder.name, given.name, teacher),
        given,
        folder=run_folder,
        lease=lease or RunLease(),
        event_log=EventLog(run_folder),
        watchdog=watchdog or Watchdog(config.watchdog, run_folder, stop, CollectiveTrace()),
        parts=StepParts(built.engine),
    )


def build_callbacks(context: TrainingContext) -> list[Callback]:
    """Builds the callbacks that the configuration asks for, in the order in which they see a step.

    Whether the folder is still the run's comes first, before anything writes to it. Metrics come after the evaluations
    that they record. Checkpoints come after all that counts anything, which is saved too.
    """
    config, datasets = context.run.config, context.run.data.datasets
    evaluates = config.training.eval_iters > 0
    callbacks: list[tuple[type[Callback], bool]] = [
        (RunFolder, True),
        (BatchHashes, config.monitor.log_batch_hashes),
        (Validation, evaluates and datasets.valid is not None),
        (FinalTest, evaluates and datasets.test is not None),
        (Samples, bool(config.generation.sample_prompts)),
        (Metrics, True),
        (Communication, config.monitor.comms_logger.enabled),
        (Profile, config.monitor.profile.enabled),
        (Checkpoints, config.checkpoint.save is not None),
        (RunEvents, True),
    ]
    return [callback(context) for callback, is_wanted in callbacks if is_wanted]
