"""OpenMPI and MPICH on this machine: `python -m tests.cluster.check_mpi`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.cluster.launched_runs import LauncherCheck, Runs, expect, require_programs, runs_in_temporary_folder

PROGRAMS = {
    "mpirun.openmpi": "openmpi-bin",
    "orted": "openmpi-bin",
    "mpirun.mpich": "mpich",
    "mpiexec.hydra": "mpich",
}
AS_ROOT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}
MEETING_POINT = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}


def only(folder: Path, **programs: str) -> str:
    """Makes a folder for PATH in which `mpirun` and `mpiexec` are those of one MPI; both may be installed."""
    folder.mkdir()
    for name, program in programs.items():
        (folder / name).symlink_to(shutil.which(program) or program)
    return str(folder)


def start_directly(runs: Runs, name: str, program: str, variables: Mapping[str, str]) -> None:
    """Starts train.py, and then deepy.py, by mpirun: it is one run of two ranks, and not two of one."""
    for script in (("train.py",), ("deepy.py", "train.py")):
        begin = time.monotonic()
        run = f"{name} {script[0]}"
        command = runs.command(run, ["pipe_parallel_size=2"], script=script)
        finished = subprocess.run(
            [program, "-n", "2", *command],
            cwd=runs.work,
            env={**runs.environment, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        expect(finished.returncode == 0, finished.stdout + finished.stderr)
        check = LauncherCheck(runs, name, [])
        check.compare(run)
        check.passed(f"`{program} -n 2 python {' '.join(script)}` is one run, losses of one process", begin)


def main() -> None:
    """Runs the checks of OpenMPI and MPICH."""
    require_programs(PROGRAMS)
    with runs_in_temporary_folder() as runs:
        path = runs.environment["PATH"]
        openmpi = f"{only(runs.folder / 'openmpi', mpirun='mpirun.openmpi', orted='orted')}:{path}"
        hydra = {"mpirun": "mpirun.mpich", "mpiexec": "mpiexec.hydra", "hydra_pmi_proxy": "hydra_pmi_proxy"}
        mpich = f"{only(runs.folder / 'mpich', **hydra)}:{path}"
        LauncherCheck(runs, "openmpi", ["launcher=openmpi", "num_gpus=2"], {"PATH": openmpi, **AS_ROOT}).all()
        start_directly(runs, "openmpi", "mpirun.openmpi", AS_ROOT)
        LauncherCheck(runs, "mpich", ["launcher=mpich", "num_gpus=2"], {"PATH": mpich}).all()
        start_directly(runs, "mpich", "mpirun.mpich", MEETING_POINT)
    print("check_mpi: passed")


if __name__ == "__main__":
    sys.exit(main())
