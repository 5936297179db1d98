"""MPICH, whose processes Hydra starts."""

from __future__ import annotations

from functools import partial

from megatron.launch.hydra import HYDRA_VARIABLES, start_by_hydra
from megatron.launch.launcher import LAUNCHERS, Launcher

LAUNCHERS.register("mpich")(Launcher(HYDRA_VARIABLES, start=partial(start_by_hydra, "mpiexec"), program="mpiexec"))
