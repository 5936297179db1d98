"""From a process with a rank in its environment to an initialized process group, and back."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

import torch

from megatron.errors import EnvironmentSetupError

# What each launcher calls the rank, the number of ranks and the rank within the machine. Step-level Slurm variables
# describe the srun that started this process; job-level ones may describe a bigger allocation.
LAUNCHER_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


def world_size_from_environment(environment: Mapping[str, str]) -> int:
    """Ranks of this run as the launcher (deepy.py, torchrun, srun, mpirun) announces them; 1 without a launcher."""
    for _, world_size, _ in LAUNCHER_VARIABLES:
        if world_size in environment:
            return int(environment[world_size])
    return 1


def adopt_launcher_environment(environment: MutableMapping[str, str]) -> None:
    """Translate the launcher's variables to RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Raises EnvironmentSetupError when several ranks do not know where to meet.
    """
    for names in LAUNCHER_VARIABLES:
        if all(name in environment for name in names):
            for ours, theirs in zip(LAUNCHER_VARIABLES[0], names, strict=True):
                environment[ours] = environment[theirs]
            break
    environment.setdefault("RANK", "0")
    environment.setdefault("WORLD_SIZE", "1")
    environment.setdefault("LOCAL_RANK", "0")
    if int(environment["WORLD_SIZE"]) == 1:
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            raise EnvironmentSetupError(
                f"{environment['WORLD_SIZE']} ranks were started, but {name} is not set, so they cannot meet. "
                "Export MASTER_ADDR (the first node's name) and MASTER_PORT (a free port) before srun or mpirun."
            )


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Initialize torch.distributed through DeepSpeed (NCCL with GPUs, gloo without); yields this rank's device.

    Leaves with a barrier and a clean shutdown, without which ranks that have finished may abort.
    """
    adopt_launcher_environment(os.environ)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed compiles a shared-memory collective for CPU ranks while it starts. gloo does the same work without
    # a compiler, and a user's first run should not need one.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
    yield device
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
