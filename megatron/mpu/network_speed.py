"""Measures how fast ranks sum a tensor, and a device's work in general."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

TRIES = 5


@dataclass(frozen=True)
class AllReduceSpeed:
    """Speed of an all-reduce."""

    bandwidth: float
    """Data that is summed in a second [bytes/s]."""
    bus: float
    """Data that each link carries in each direction, as NCCL's tests count it: 2 (n - 1) / n of the data [bytes/s]."""
    latency: float
    """Time of one element [s]."""


def all_reduce_speed(values: Tensor, group: distributed.ProcessGroup | None = None) -> AllReduceSpeed:
    """Measures an all-reduce of `values`, which changes them, and of one of their elements. Collective over the group.

    The group has at least two ranks.
    """
    size = distributed.get_world_size(group)
    seconds = median_seconds(lambda: distributed.all_reduce(values, group=group))
    latency = median_seconds(lambda: distributed.all_reduce(values[:1], group=group))
    bandwidth = values.numel() * values.element_size() / seconds
    return AllReduceSpeed(bandwidth, 2 * (size - 1) / size * bandwidth, latency)


def median_seconds(work: Callable[[], object], tries: int = TRIES) -> float:
    """Returns the median time of `work` on this rank's device [s]."""
    times = []
    for _ in range(tries):
        wait_for_device()
        begin = time.perf_counter()
        work()
        wait_for_device()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def wait_for_device() -> None:
    """Waits until this rank's GPU has done what was asked of it; a CPU has."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
