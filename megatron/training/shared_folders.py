"""Tells, before the first step, whether all machines of a run see what they must see in common.

Checkpoints are written by all ranks into one folder. Datasets may lie on each machine's own disk, if they are the same;
so may sample indices, which each machine builds where it finds none.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron.data.data_fingerprint import fingerprint_differences
from megatron.errors import CheckpointError, DataError, UserError, os_errors_as
from megatron.mpu.agreement import gather_objects, on_first_rank, rank_and_size

PROBE = ".probe."
SEEN_SECONDS = 15.0
"""Time in which a file of rank 0 must show on other machines; a network's file system may answer from memory."""
POLL_SECONDS = 0.2


def require_shared_save(save: Path) -> None:
    """Raises CheckpointError, on all ranks, unless all ranks see in the folder `save` what rank 0 writes there.

    Collective. The folder exists on rank 0.
    """
    if rank_and_size()[1] == 1:
        return
    name = f"{PROBE}{on_first_rank(lambda: uuid.uuid4().hex)}"

    def write() -> None:
        for leftover in save.glob(f"{PROBE}*"):
            leftover.unlink(missing_ok=True)
        (save / name).touch()

    with os_errors_as(CheckpointError, f"save: {save}"):
        on_first_rank(write)
    places = gather_objects((socket.gethostname(), _appears(save / name)))
    on_first_rank(partial((save / name).unlink, missing_ok=True))
    blind = [f"rank {rank} ({host})" for rank, (host, sees) in enumerate(places) if not sees]
    if blind:
        raise CheckpointError(
            f"save: {save} of rank 0 ({places[0][0]}) is another folder than that of {_listed(blind)}, and "
            "checkpoints would be in pieces. Name a folder of a file system that all machines mount in the same "
            "place; `save_remote` sends copies to a store."
        )


def same_data_everywhere(fingerprint: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Returns the fingerprint of the data. Collective; the first rank of each machine looks at its own files.

    Raises DataError, on all ranks, where they differ from those of rank 0, or cannot be read.
    """
    rank, _ = rank_and_size()
    own: dict[str, str] | UserError | None = None
    if rank == 0 or os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            own = fingerprint()
        except UserError as error:
            own = error
    places = gather_objects((socket.gethostname(), own))
    first = places[0][1]
    if not isinstance(first, dict):
        raise first or DataError("rank 0 has no data")
    for other, (host, found) in enumerate(places):
        if isinstance(found, UserError):
            raise DataError(f"rank {other} ({host}): {found}") from found
        differences = [] if found is None else list(fingerprint_differences(found, first, "rank 0"))
        if differences:
            raise DataError(
                f"rank {other} ({host}) has other data than rank 0 ({places[0][0]}): "
                f"{'; '.join(differences).replace('this run', f'rank {other}')}. Copy the same files to every machine."
            )
    return first


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
