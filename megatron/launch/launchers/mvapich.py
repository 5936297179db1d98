"""MVAPICH, whose processes Hydra starts; version 2 has variables of its own."""

from __future__ import annotations

from functools import partial

from megatron.launch.hydra import start_by_hydra
from megatron.launch.launcher import LAUNCHERS, Launcher, LauncherVariables

VARIABLES = LauncherVariables("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK")

LAUNCHERS.register("mvapich")(Launcher(VARIABLES, start=partial(start_by_hydra, "mpiexec"), program="mpiexec"))
