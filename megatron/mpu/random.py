"""Random numbers of dropout: the same on tensor-parallel ranks that hold the same activations, else each rank's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron.mpu.context import ParallelContext


def seed_dropout(seed: int, iteration: int, context: ParallelContext) -> None:
    """Seeds the default generators by step, pipe and data rank, alike on the tensor-parallel ranks between them.

    Called before each step, so that a resumed run draws what an uninterrupted one does without any saved state.
    """
    torch.manual_seed(_mix(seed, iteration, context.pipe_rank, context.data_rank))


@contextmanager
def split_activations(context: ParallelContext) -> Iterator[None]:
    """Gives the body, which draws for activations split over tensor-parallel ranks, random numbers of this rank's own.

    The body's seed is drawn from the default CPU generator, so that whoever restores the default generators, as
    activation checkpointing does, restores these numbers too. Afterwards the default generators stand as if only that
    one draw had happened, alike on all tensor-parallel ranks.
    """
    if context.tensor_size == 1:
        yield
        return
    common = int(torch.randint(2**62, (), device="cpu"))
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_mix(common, context.tensor_rank))
        yield


def _mix(*numbers: int) -> int:
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
