"""Prepares a process that some launcher has started: its rank, its accelerator, its log."""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping
from dataclasses import astuple, dataclass

from megatron.errors import EnvironmentSetupError
from megatron.registry import Registry


@dataclass(frozen=True)
class LauncherVariables:
    """Names of the environment variables by which a launcher tells a process its place."""

    rank: str
    """Rank among all processes, from 0."""

    world_size: str
    """Number of ranks."""

    local_rank: str
    """Rank among those of this machine, from 0."""


TORCHRUN = LauncherVariables("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""Also the names that everything here reads."""

LAUNCHERS: Registry[LauncherVariables] = Registry("launcher")
"""Launchers in order of precedence: the first whose variables are all set has started this process."""

# torchrun may itself run under one of the others, which then describe the processes that it runs in.
LAUNCHERS.register("torchrun")(TORCHRUN)
# Step-level variables describe the srun that started this process; job-level ones may describe a bigger allocation.
LAUNCHERS.register("slurm")(LauncherVariables("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
LAUNCHERS.register("openmpi")(
    LauncherVariables("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
)


def adopt_launcher_environment(environment: MutableMapping[str, str]) -> None:
    """Translates the launcher's variables to RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Raises EnvironmentSetupError when several ranks do not know where to meet.
    """
    for launcher in (LAUNCHERS[name] for name in LAUNCHERS):
        if all(name in environment for name in astuple(launcher)):
            for ours, theirs in zip(astuple(TORCHRUN), astuple(launcher), strict=True):
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


def prepare_environment() -> None:
    """Adopts the launcher's variables, chooses the accelerator and sets up logging, before DeepSpeed is imported.

    Raises EnvironmentSetupError when more ranks were started on this machine than it has GPUs.
    """
    import torch

    adopt_launcher_environment(os.environ)
    if torch.cuda.is_available():
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            raise EnvironmentSetupError(
                f"local rank {local_rank} has no GPU: this machine shows {gpus}. Start at most {gpus} ranks on it "
                "(`num_gpus`, torchrun's --nproc-per-node, srun's --ntasks-per-node), or widen CUDA_VISIBLE_DEVICES."
            )
        torch.cuda.set_device(local_rank)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.basicConfig(level=logging.WARNING, format=f"[rank {os.environ['RANK']}] %(levelname)s %(message)s")
    logging.getLogger("megatron").setLevel(logging.INFO if os.environ["RANK"] == "0" else logging.WARNING)
