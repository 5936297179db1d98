"""Takes training steps on one rank of a data-parallel group, when it is told to, by whichever checkout it finds."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any


def main(words: list[str], vocab_size: int | None, store: str) -> None:
    """Builds the engine, then answers each number of steps on standard input by a line about them."""
    from megatron.launch.environment import prepare_environment

    prepare_environment()
    import torch
    from torch import distributed

    from megatron.config.command_line import parse_command_line
    from megatron.config.load_config import load_config
    from megatron.data.micro_batch import to_inputs_and_labels
    from megatron.data.tokenizer import build_tokenizer, padded_vocab_size
    from megatron.model.causal_lm import VocabSize
    from megatron.monitor.provenance import device_name
    from megatron.mpu.context import ParallelContext
    from megatron.training.build_engine import build_engine
    from megatron.training.stability.deepspeed_patches import join_process_group
    from megatron.training.stop_request import StopRequest

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    meeting = distributed.FileStore(store, ranks)  # type: ignore[attr-defined]
    distributed.init_process_group("nccl" if on_gpu else "gloo", store=meeting, rank=rank, world_size=ranks)
    join_process_group()
    command = parse_command_line(words)
    loaded = load_config(command.files, command.overrides)
    batch = loaded.batch(ranks)
    actual = vocab_size or build_tokenizer(loaded.run.data.tokenizer).vocab_size
    vocab = VocabSize(actual, padded_vocab_size(loaded.run.model, actual))
    engine = build_engine(loaded.run, batch, vocab, ParallelContext.create(1, 1), StopRequest()).engine
    generator = torch.Generator().manual_seed(rank)

    def batches() -> Iterator[Any]:
        while True:
            shape = (batch.micro_batch_size, loaded.run.model.seq_length + 1)
            yield to_inputs_and_labels(torch.randint(actual, shape, generator=generator), eod_token=None)

    micro_batches = batches()
    about = {
        "parameters": sum(parameter.numel() for parameter in engine.module.parameters()),
        "dtype": loaded.run.training.precision.dtype,
        "device": device_name(),
        "torch": torch.__version__,
    }
    for line in sys.stdin:
        distributed.barrier()
        start = time.perf_counter()
        losses = [engine.train_batch(micro_batches) for _ in range(int(line))]
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(json.dumps(about | {"seconds": seconds, "losses": [float(loss) for loss in losses]}), flush=True)
