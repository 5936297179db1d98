"""Ranks from the variables of each launcher, and refusal of those that nobody here knows."""

from __future__ import annotations

import pytest

from megatron.errors import EnvironmentSetupError
from megatron.launch.environment import FOREIGN_MARKS, adopt_launcher_environment
from megatron.launch.launcher import LAUNCHERS, Launcher, LauncherVariables
from megatron.launch.launchers.slurm import first_host

MEETING_POINT = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS": "64"}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4", "PMI_FD": "6"}
MVAPICH = {"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "8", "MV2_COMM_WORLD_LOCAL_RANK": "1"}
ONE_SRUN_TASK = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}


def adopted(environment: dict[str, str]) -> tuple[str, str, str]:
    adopt_launcher_environment(environment)
    return environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]


@pytest.mark.parametrize(
    "launcher",
    [
        TORCHRUN,
        SRUN,
        OPENMPI | {"PMIX_RANK": "3"},
        HYDRA,
        MVAPICH | {"PMI_RANK": "3"},
        # Of a launcher in another, the inner one counts: srun has started torchrun's agents, or mpirun's daemons.
        TORCHRUN | ONE_SRUN_TASK,
        OPENMPI | ONE_SRUN_TASK,
        HYDRA | ONE_SRUN_TASK,
        SRUN | {"PMI_RANK": "3", "PMI_SIZE": "8", "PMIX_RANK": "3"},
    ],
    ids=[
        *("torchrun", "srun", "OpenMPI", "MPICH", "MVAPICH"),
        *("torchrun in srun", "OpenMPI in srun", "MPICH in srun", "srun with PMI"),
    ],
)
def test_every_launcher_is_understood(launcher: dict[str, str]) -> None:
    assert adopted(launcher | MEETING_POINT) == ("3", "8", "1")


def test_pods_without_a_local_rank_have_one_gpu_each() -> None:
    assert adopted({"RANK": "3", "WORLD_SIZE": "8"} | MEETING_POINT) == ("3", "8", "0")


@pytest.mark.parametrize(
    ("binding", "local_rank"),
    [
        # As a Slurm of 22.05 sets them.
        ({"SLURMD_TRES_BIND": "gpu:per_task:1", "SLURM_STEP_GPUS": "1"}, "0"),
        ({"SLURMD_TRES_BIND": "gpu:single:1", "SLURM_STEP_GPUS": "1"}, "0"),
        ({"SLURMD_TRES_BIND": "gpu:map_gpu:0,1", "SLURM_STEP_GPUS": "1"}, "0"),
        ({"SLURMD_TRES_BIND": "gpu:none"}, "1"),
        ({"SLURM_STEP_GPUS": "0,1"}, "1"),
    ],
)
def test_a_task_with_a_gpu_of_its_own_takes_the_one_that_it_sees(binding: dict[str, str], local_rank: str) -> None:
    assert adopted(SRUN | binding | MEETING_POINT) == ("3", "8", local_rank)


def test_a_new_launcher_is_one_registration() -> None:
    LAUNCHERS.register("ours")(Launcher(LauncherVariables("OUR_RANK", "OUR_SIZE", "OUR_LOCAL_RANK")))
    environment = {"OUR_RANK": "3", "OUR_SIZE": "8", "OUR_LOCAL_RANK": "1"} | MEETING_POINT
    try:
        assert adopted(environment) == ("3", "8", "1")
    finally:
        LAUNCHERS.unregister("ours")


@pytest.mark.parametrize("mark", FOREIGN_MARKS)
def test_a_launcher_that_nobody_knows_is_refused(mark: str) -> None:
    """Taken for processes by themselves, its ranks would each train the run, in the same folder."""
    with pytest.raises(EnvironmentSetupError, match=f"{mark}=1 says that a launcher has started this process"):
        adopt_launcher_environment({mark: "1"})


def test_a_rank_without_the_number_of_ranks_is_refused() -> None:
    with pytest.raises(EnvironmentSetupError, match="RANK=2 says"):
        adopt_launcher_environment({"RANK": "2"})


def test_one_rank_needs_no_launcher() -> None:
    environment: dict[str, str] = {}
    adopt_launcher_environment(environment)
    assert environment["WORLD_SIZE"] == "1"
    assert environment["MASTER_ADDR"] == "127.0.0.1"


def test_tasks_of_a_step_meet_on_its_first_node() -> None:
    """All derive the same address and port, and those of a step beside it another port."""
    step = {"SLURM_STEP_NODELIST": "node[03-04]", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}
    tasks = [SRUN | step | {"SLURM_PROCID": str(rank)} for rank in range(8)]
    others = SRUN | step | {"SLURM_STEP_ID": "1"}
    for environment in (*tasks, others):
        adopt_launcher_environment(environment)
    assert {task["MASTER_ADDR"] for task in tasks} == {"node03"}
    assert len({task["MASTER_PORT"] for task in tasks}) == 1
    assert others["MASTER_PORT"] != tasks[0]["MASTER_PORT"]


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node7", "node7"),
        ("node7,node8", "node7"),
        ("node[001-016,020]", "node001"),
        ("rack[2,4]-n[05-08],login", "rack2-n05"),
        ("gpu-[3]-ib,gpu-9-ib", "gpu-3-ib"),
    ],
)
def test_the_first_of_slurms_host_lists(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_ranks_of_one_machine_under_openmpi_meet_on_loopback() -> None:
    one_machine = OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "PMIX_NAMESPACE": "961806337"}
    adopt_launcher_environment(one_machine)
    assert one_machine["MASTER_ADDR"] == "127.0.0.1"
    assert 20_000 <= int(one_machine["MASTER_PORT"]) < 32_000
    with pytest.raises(EnvironmentSetupError, match="8 ranks were started, but MASTER_ADDR is not set"):
        adopt_launcher_environment(OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "961806337"})
