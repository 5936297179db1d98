"""Prepares a process that some launcher has started: its rank, its accelerator, its log."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping, MutableMapping

from megatron.errors import EnvironmentSetupError
from megatron.launch.launcher import LAUNCHERS, Launcher, Place
from megatron.rank_channel import end_with_parent

FOREIGN_MARKS = (
    *("PMIX_RANK", "PMI_RANK", "PMI_ID", "PALS_RANKID", "ALPS_APP_PE", "FLUX_TASK_RANK", "JSM_NAMESPACE_RANK"),
    *("MPI_RANKID", "MV2_COMM_WORLD_RANK", "OMPI_COMM_WORLD_RANK"),
)
"""Variables of processes that some launcher has started as one of several. No launcher here reads them alone."""


def find_place(environment: Mapping[str, str]) -> tuple[Place, Launcher] | None:
    """Returns the place that a launcher has given this process, and the launcher; None where none has started it.

    Raises EnvironmentSetupError for a launcher that is not known here: taken for a process by itself, each of its
    processes would train the whole run, in the same folder.
    """
    for launcher in sorted((LAUNCHERS[name] for name in LAUNCHERS), key=lambda launcher: launcher.order):
        place = launcher.place(environment)
        if place is not None:
            return place, launcher
    mark = next((name for name in FOREIGN_MARKS if name in environment), None)
    if mark is None and environment.get("RANK", "0") != "0":
        mark = "RANK"
    if mark is not None:
        raise EnvironmentSetupError(
            f"{mark}={environment[mark]} says that a launcher has started this process as one of several, and none of "
            f"those that are known here ({', '.join(LAUNCHERS)}) has set its variables. Set RANK, WORLD_SIZE, "
            f"LOCAL_RANK, MASTER_ADDR and MASTER_PORT in each process; or unset {mark}, if it is one by itself."
        )
    return None


def adopt_launcher_environment(environment: MutableMapping[str, str]) -> None:
    """Translates the launcher's variables to RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Raises EnvironmentSetupError when the launcher is not known, or several ranks do not know where to meet.
    """
    found = find_place(environment)
    place = Place(0, 1, 0) if found is None else found[0]
    meeting_point = ("127.0.0.1", 0) if place.world_size == 1 else None
    if found is not None and meeting_point is None and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        meeting_point = found[1].meeting_point(environment)
    environment["RANK"] = str(place.rank)
    environment["WORLD_SIZE"] = str(place.world_size)
    environment["LOCAL_RANK"] = str(place.local_rank)
    if meeting_point is not None:
        environment.setdefault("MASTER_ADDR", meeting_point[0])
        environment.setdefault("MASTER_PORT", str(meeting_point[1]))
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

    found = find_place(os.environ)
    if found is not None and found[1].is_parent(os.environ):
        # Neither mpirun nor torchrun ends its ranks when it is killed itself.
        end_with_parent(os.getppid(), signal.SIGKILL)
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
