"""Process groups of training and of inference, from first to last collective."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron.mpu.context import ParallelContext


@contextmanager
def process_group() -> Iterator[None]:
    """Initialize torch.distributed through DeepSpeed, with NCCL on GPUs and gloo without.

    Leaves with a barrier, and in any case with a clean shutdown, without which ranks may abort.
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed compiles a shared-memory collective for CPU ranks while it starts. gloo does the same work without
    # a compiler, and a user's first run should not need one.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    try:
        yield
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def inference_ranks(tensor_parallel_size: int) -> Iterator[ParallelContext]:
    """The ranks that the environment announces, as tensor- and data-parallel ranks of one pipeline stage.

    Needs no DeepSpeed. Raises ConfigError when the tensor-parallel size does not divide the ranks.
    """
    if os.environ["WORLD_SIZE"] == "1" and tensor_parallel_size == 1:
        yield ParallelContext.single()
        return
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield ParallelContext.create(tensor_parallel_size, pipe=1)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
