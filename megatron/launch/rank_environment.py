"""The environment of a rank that is started here: its place, the meeting point, its GPUs and its threads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from megatron.launch.launcher import Place

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"


def rank_environment(
    base: Mapping[str, str], place: Place, meeting_point: tuple[str, int], slots: Sequence[int]
) -> dict[str, str]:
    """Builds the environment of one of the ranks on the GPUs `slots` of this machine, by number among those it shows.

    Threads are shared out among the ranks unless the user has decided. They sleep while they wait: threads that spin
    instead slow a run down tenfold where other programs share the cores.
    """
    threads = max((os.cpu_count() or 1) // len(slots), 1)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        **base,
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world_size),
        "MASTER_ADDR": meeting_point[0],
        "MASTER_PORT": str(meeting_point[1]),
    }
    if list(slots) != list(range(len(slots))):
        environment[DEVICES_VARIABLE] = _chosen(base.get(DEVICES_VARIABLE), slots)
    return environment


def _chosen(visible: str | None, slots: Sequence[int]) -> str:
    names = [] if visible is None else visible.split(",")
    return ",".join(names[slot] if slot < len(names) else str(slot) for slot in slots)
