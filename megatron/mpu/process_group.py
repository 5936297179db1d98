"""The default process group of training and of inference, from first to last collective."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from megatron.mpu.context import ParallelContext

TIMEOUT_VARIABLE = "DEEPSPEED_TIMEOUT"
"""DeepSpeed's variable for the time that a collective may take [min]; 10 without it."""


def local_device() -> torch.device:
    """Returns this rank's GPU, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def process_group() -> Iterator[None]:
    """Makes the default process group of the ranks that the environment announces: NCCL on GPUs, gloo without.

    Leaves with a barrier, and in any case with a clean shutdown, without which ranks may abort.
    """
    device = local_device()
    # As DeepSpeed does: NCCL is bound to its device at once. A single rank has no peer to reach.
    bound = device.type == "cuda" and int(os.environ["WORLD_SIZE"]) > 1
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(minutes=int(os.environ.get(TIMEOUT_VARIABLE, "10"))),
        device_id=device if bound else None,
    )
    try:
        yield
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


@contextmanager
def inference_context(tensor_parallel_size: int) -> Iterator[ParallelContext]:
    """Yields the context of tensor- and data-parallel ranks of one pipeline stage, on the ranks of the environment.

    One rank alone needs no process group. Raises ConfigError when the tensor-parallel size does not divide the ranks.
    """
    if os.environ["WORLD_SIZE"] == "1" and tensor_parallel_size == 1:
        yield ParallelContext.single()
        return
    with process_group():
        yield ParallelContext.create(tensor_parallel_size, pipe=1)
