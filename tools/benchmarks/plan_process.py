"""One rank of the benchmark of plans: trains on random tokens, and says what its steps take."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch

from megatron.config.load_config import LoadedConfig
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import BatchConfig
from megatron.data.micro_batch import MicroBatch, to_inputs_and_labels
from megatron.model.causal_lm import VocabSize
from megatron.monitor.held_memory import HeldMemory
from megatron.mpu.context import ParallelContext
from megatron.mpu.process_group import process_group
from megatron.mpu.random import seed_dropout
from megatron.training.build_engine import build_engine, release_engine
from megatron.training.calibrate import work_clock
from megatron.training.stability.deepspeed_patches import join_process_group
from megatron.training.stop_request import StopRequest


def serve(loaded: LoadedConfig, rank: int, size: int, port: int, connection: Connection) -> None:
    """Builds the engine of a rank, then answers requests until the connection closes.

    "step" takes a step and is answered by its seconds, "memory" by the peak beyond the imports [bytes].
    """
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
    logging.basicConfig(level=logging.WARNING)
    run, batch = loaded.run, loaded.batch(size)
    rows = run.model.padded_vocab_size or 0
    with process_group():
        join_process_group()
        sizes = run.parallel
        context = ParallelContext.create(sizes.model_parallel_size, sizes.pipe_parallel_size, sizes.sequence_parallel)
        import_late_modules(run, rows, context)
        held = HeldMemory()
        engine = build_engine(run, batch, VocabSize(rows, rows), context, StopRequest()).engine
        batches = random_batches(rows, batch.micro_batch_size, run.model.seq_length, context.data_rank)
        clock, number = work_clock(), 0
        connection.send(0.0)  # ready
        while True:
            try:
                request = connection.recv()
            except EOFError:
                return
            if request == "memory":
                connection.send(held.peak())
                continue
            begin = clock()
            seed_dropout(run.training.seed, number, context)
            engine.train_batch(batches).item()
            connection.send(clock() - begin)
            number += 1


def import_late_modules(run: RunConfig, rows: int, context: ParallelContext) -> None:
    """Takes a step of the same model with one layer and one sample, for what DeepSpeed imports only then."""
    training = {"train_batch_size": None, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    small = run.model_copy(
        update={
            "model": run.model.model_copy(update={"num_layers": 1}),
            "training": run.training.model_copy(update=training),
        }
    )
    batch = BatchConfig(micro_batch_size=1, gradient_accumulation_steps=1, data_parallel_size=context.data_size)
    engine = build_engine(small, batch, VocabSize(rows, rows), context, StopRequest()).engine
    engine.train_batch(random_batches(rows, 1, run.model.seq_length, context.data_rank))
    release_engine(engine)


def random_batches(rows: int, micro_batch_size: int, seq_length: int, seed: int) -> Iterator[MicroBatch]:
    """Yields micro batches of random tokens without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        drawn = torch.randint(rows, (micro_batch_size, seq_length + 1), generator=generator)
        yield to_inputs_and_labels(drawn, eod_token=None)


def threads() -> int:
    """Returns the threads that a rank computes with."""
    return torch.get_num_threads()
