"""Ranks from the variables of each launcher."""

from __future__ import annotations

import pytest

from megatron.errors import EnvironmentSetupError
from megatron.launch.environment import LAUNCHERS, LauncherVariables, adopt_launcher_environment

MEETING_POINT = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "launcher",
    [
        {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},
        {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS": "64"},
        {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
        # torchrun inside a Slurm allocation: the inner launcher counts.
        {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1",
         "SLURM_LOCALID": "0"},
    ],
    ids=["torchrun", "srun", "mpirun", "torchrun in srun"],
)  # fmt: skip
def test_every_launcher_is_understood(launcher: dict[str, str]) -> None:
    environment = launcher | MEETING_POINT
    adopt_launcher_environment(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("3", "8", "1")


def test_a_new_launcher_is_one_registration() -> None:
    LAUNCHERS.register("ours")(LauncherVariables("OUR_RANK", "OUR_SIZE", "OUR_LOCAL_RANK"))
    environment = {"OUR_RANK": "3", "OUR_SIZE": "8", "OUR_LOCAL_RANK": "1"} | MEETING_POINT
    try:
        adopt_launcher_environment(environment)
    finally:
        LAUNCHERS.unregister("ours")
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("3", "8", "1")


def test_one_rank_needs_no_launcher() -> None:
    environment: dict[str, str] = {}
    adopt_launcher_environment(environment)
    assert environment["WORLD_SIZE"] == "1"
    assert environment["MASTER_ADDR"] == "127.0.0.1"


def test_ranks_that_cannot_meet() -> None:
    with pytest.raises(EnvironmentSetupError, match="8 ranks were started, but MASTER_ADDR is not set"):
        adopt_launcher_environment({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"})
