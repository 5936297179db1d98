"""Builds one contender of the training benchmark and takes its steps, in the process that it has to itself."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch

from megatron.config.load_config import load_config
from megatron.config.model_size import count_parameters, training_flops
from megatron.data.tokenizer import build_tokenizer, padded_vocab_size
from megatron.model.causal_lm import VocabSize
from megatron.monitor.provenance import device_name
from megatron.monitor.throughput import peak_memory_gib
from megatron.mpu.process_group import process_group
from megatron.planner.devices import peak_flops
from megatron.training.build_engine import require_hardware
from megatron.training.stability.deepspeed_patches import join_process_group
from tools.benchmarks.contenders import CONTENDERS, Contender, Task
from tools.benchmarks.peers import AS_COMPILED, COMPILED, TRANSFORMER, equal_transformer
from tools.benchmarks.turns import synchronized_seconds

if TYPE_CHECKING:
    from tools.benchmarks.benchmark_training import Settings


def answer_requests(name: str, settings: Settings, connection: Connection) -> None:
    """Builds the contender, sends a description of the task, then answers requests until the connection closes.

    "run" takes a block of steps and is answered by its seconds and losses, "memory" by the peak so far [GiB].
    Raises what training raises for a configuration that cannot run here.
    """
    task = build_task(name, settings)
    with process_group():
        join_process_group()
        contender = CONTENDERS[name](task)
        connection.send(describe(task, settings))
        while True:
            try:
                request = connection.recv()
            except EOFError:
                return
            connection.send(peak_memory_gib() if request == "memory" else run_block(contender, settings.steps))


def build_task(name: str, settings: Settings) -> Task:
    """Builds the task of a contender, on one rank; reads the tokenizer only without --vocab-size."""
    compiled = (AS_COMPILED,) if name == COMPILED[0] else ()
    loaded = load_config(settings.command.files, [*settings.command.overrides, *compiled])
    actual = settings.vocab_size or build_tokenizer(loaded.run.data.tokenizer).vocab_size
    if name.startswith(TRANSFORMER):
        loaded = equal_transformer(settings.command, actual)
    require_hardware(loaded.run)
    return Task(loaded.run, loaded.batch(1), VocabSize(actual, padded_vocab_size(loaded.run.model, actual)))


def describe(task: Task, settings: Settings) -> dict[str, Any]:
    """Describes the task and the machine."""
    model, batch, dtype = task.config.model, task.batch, task.config.training.precision.dtype
    return {
        "config": [*map(str, settings.command.files), *settings.command.overrides],
        "parameters": count_parameters(model, task.vocab.padded),
        "micro_batch_size": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "seq_length": model.seq_length,
        "dtype": dtype,
        "device": device_name(),
        "cpu_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "flops_per_token": training_flops(model, task.vocab.padded, model.seq_length),
        "peak_flops": peak_flops(device_name(), dtype),
    }


def run_block(contender: Contender, steps: int) -> dict[str, Any]:
    """Takes `steps` optimizer steps; returns their seconds, those of this process on its cores, and losses."""
    start, processor_start = synchronized_seconds(), time.process_time()
    losses = [contender.step() for _ in range(steps)]
    seconds, processor_seconds = synchronized_seconds() - start, time.process_time() - processor_start
    return {"seconds": seconds, "processor_seconds": processor_seconds, "losses": torch.stack(losses).tolist()}
