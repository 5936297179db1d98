"""Times saves, loads and conversions of checkpoints, in the process of the one rank, which must be prepared first."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from deepspeed.runtime.pipe.engine import PipelineEngine

from megatron.checkpointing.convert.reshape import reshape
from megatron.checkpointing.engine.load_universal import load_universal
from megatron.checkpointing.engine.loading import load_checkpoint
from megatron.checkpointing.engine.saving import Saver
from megatron.checkpointing.engine.universal import universal_form
from megatron.checkpointing.store.checkpoint import read_checkpoint
from megatron.checkpointing.store.find_checkpoint import problems_of
from megatron.config.sections.parallel import ParallelConfig
from megatron.config.sections.run_config import RunConfig
from megatron.data.datasets import SampleCounts
from megatron.mpu.context import ParallelContext
from megatron.mpu.process_group import process_group
from megatron.training.build_engine import build_engine
from megatron.training.stability.deepspeed_patches import join_process_group
from megatron.training.stop_request import StopRequest
from megatron.training.training_context import initial_run_state
from tools.benchmarks.benchmark_training import Settings
from tools.benchmarks.contender_process import build_task, describe
from tools.benchmarks.contenders import Task, random_batches

STEPS_ALONE = 3
"""Steps that are timed before a save, and after it."""


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """Measures the seconds of everything in each round, and sizes. Leaves in `folder` what it writes there."""
    task = build_task("engine", settings)
    context = ParallelContext.single()
    with process_group():
        join_process_group()
        engine = build_engine(saving_to(task.config, folder), task.batch, task.vocab, context, StopRequest()).engine
        batches = random_batches(task)
        # The first step makes the moments.
        engine.train_batch(batches)
        rounds = []
        for number in range(settings.rounds):
            place = folder / str(number)
            rounds.append(
                saves(engine, batches, task, place) | loads(engine, task, place) | conversions(engine, task, place)
            )
        sizes = {
            "checkpoint": folder_size(folder / "0" / "global_step2"),
            "universal form": folder_size(folder / "0" / "global_step1" / "universal"),
        }
    names = rounds[0]
    return describe(task, settings) | {"seconds": {n: [one[n] for one in rounds] for n in names}, "bytes": sizes}


def saves(engine: PipelineEngine, batches: Iterator[Any], task: Task, folder: Path) -> dict[str, float]:
    """Writes global_step1 while training waits, and global_step2 while it goes on."""
    state = initial_run_state(SampleCounts(0, 0, 0), {}, task.vocab, ParallelContext.single())
    alone = [timed(lambda: engine.train_batch(batches)) for _ in range(STEPS_ALONE)]
    seconds = {}
    saver = Saver(engine, saving_to(task.config, folder), run_id="benchmark", versions={})
    seconds["synchronous save"] = timed(lambda: saver.save(replace(state, iteration=1), wait=True))
    seconds["asynchronous save: copy"] = timed(lambda: saver.save(replace(state, iteration=2), wait=False))
    begin, steps, published = time.perf_counter(), [], []
    while saver.is_saving:
        steps.append(timed(lambda: engine.train_batch(batches)))
        published.append(timed(saver.publish_if_written))
    seconds["asynchronous save: publish"] = sum(published)
    seconds["asynchronous save: in the background"] = time.perf_counter() - begin - sum(published)
    # Steps before and after it count alike: a machine that gets slower or faster meanwhile does so for both.
    alone += [timed(lambda: engine.train_batch(batches)) for _ in range(STEPS_ALONE)]
    seconds["step"] = statistics.median(alone)
    seconds["step while a save is written"] = statistics.mean(steps)
    return seconds


def loads(engine: PipelineEngine, task: Task, folder: Path) -> dict[str, float]:
    """Verifies and loads global_step1."""
    checkpoint, config = read_checkpoint(folder / "global_step1"), saving_to(task.config, folder)
    context = ParallelContext.single()
    return {
        "verify": timed(lambda: problems_of(checkpoint, "full")),
        "load, same layout": timed(lambda: load_checkpoint(engine, checkpoint, config, context, task.vocab)),
    }


def conversions(engine: PipelineEngine, task: Task, folder: Path) -> dict[str, float]:
    """Converts global_step1, loads the result, and rewrites the checkpoint for four ranks."""
    checkpoint = read_checkpoint(folder / "global_step1")
    section = task.config.training.optimizer
    load = partial(load_universal, context=ParallelContext.single(), section=section, vocab_size=task.vocab.actual)
    seconds = {"convert": timed(lambda: universal_form(checkpoint, "sizes"))}
    universal = universal_form(checkpoint, "sizes")
    seconds["load, converted"] = timed(lambda: load(engine, universal, same_precision=True))
    four = task.config.model_copy(
        update={"parallel": ParallelConfig(model_parallel_size=2, pipe_parallel_size=2, zero=task.config.parallel.zero)}
    )
    seconds["reshape.py"] = timed(lambda: reshape(checkpoint, four, 1, folder / "reshaped"))
    return seconds


def saving_to(config: RunConfig, folder: Path) -> RunConfig:
    """Returns `config` with asynchronous saves to `folder`."""
    checkpoint = config.checkpoint.model_copy(update={"save": str(folder), "async_save": True})
    return config.model_copy(update={"checkpoint": checkpoint})


def folder_size(folder: Path) -> int:
    """Sums the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def timed(work: Callable[[], Any]) -> float:
    """Returns the seconds that `work` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
