"""Throughput of a run: its rates, the waiting for data and saves, its memory and the time left."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
Clock = Callable[[], float]

# Weight of the past at each new measurement: the estimate follows the last ten or so.
_DECAY = 0.9


class TimedIterator(Generic[T]):
    """Passes on what `items` yields and adds up the time that its consumer waited."""

    def __init__(self, items: Iterable[T], clock: Clock = time.perf_counter) -> None:
        self._items = iter(items)
        self._clock = clock
        self.wait_seconds = 0.0
        """Waiting time so far [s]."""

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        start = self._clock()
        try:
            return next(self._items)
        finally:
            self.wait_seconds += self._clock() - start


class Throughput:
    """Turns the time between two calls of `measure` into rates.

    On an accelerator, read the loss (`.item()`) before measuring: kernels are queued, and the wall clock would
    otherwise stop before they have run.
    """

    def __init__(
        self,
        *,
        tokens_per_step: int,
        iteration: int,
        total_iterations: int,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Starts the clock at step `iteration` of `total_iterations`.

        `tokens_per_step` counts the global batch [tokens]. `flops_per_token` is the model's work, forward and backward,
        without recomputation [FLOP], and `peak_flops` the sum over all devices [FLOP/s]; None where unknown.
        """
        self.tokens_per_step = tokens_per_step
        self._total_iterations = total_iterations
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._clock = clock
        self._iteration = iteration
        self._since = clock()
        self._paused_seconds = 0.0
        self._told_seconds: dict[str, float] = {}
        self._waited_seconds = 0.0
        self._smoothed_steps = 0.0
        self._smoothed_seconds = 0.0

    @contextmanager
    def paused(self, work: str) -> Iterator[None]:
        """Leaves the time spent inside out of the rates, but not out of the time left.

        The next metrics have it as `train/{work}_seconds`.
        """
        start = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - start
            self._paused_seconds += seconds
            self._told_seconds[work] = self._told_seconds.get(work, 0.0) + seconds

    def measure(self, iteration: int, data_wait_seconds: float) -> dict[str, float]:
        """Returns the metrics of the steps since the last call, at step `iteration`; empty if there were none.

        `data_wait_seconds` is the training data's `TimedIterator.wait_seconds` [s]. `train/mfu` is there only if
        both the model's FLOPs and the devices' peak are known, the seconds of each kind of pause only if there was one
        since the last call.
        """
        steps = iteration - self._iteration
        if steps <= 0:
            return {}
        now = self._clock()
        elapsed = now - self._since
        training = elapsed - self._paused_seconds
        waited = data_wait_seconds - self._waited_seconds
        self._smoothed_steps = _DECAY * self._smoothed_steps + steps
        self._smoothed_seconds = _DECAY * self._smoothed_seconds + elapsed
        self._iteration, self._since = iteration, now
        self._paused_seconds, self._waited_seconds = 0.0, data_wait_seconds

        tokens_per_second = steps * self.tokens_per_step / training
        steps_left = max(self._total_iterations - iteration, 0)
        metrics = {
            "train/tokens_per_second": tokens_per_second,
            "train/step_seconds": training / steps,
            "train/data_wait_share": waited / training,
            "train/seconds_left": steps_left * self._smoothed_seconds / self._smoothed_steps,
        }
        metrics |= {f"train/{work}_seconds": seconds for work, seconds in self._told_seconds.items()}
        self._told_seconds.clear()
        if self._flops_per_token is not None and self._peak_flops is not None:
            metrics["train/mfu"] = self._flops_per_token * tokens_per_second / self._peak_flops
        return metrics


def peak_memory_gib() -> float:
    """Returns the peak memory of this process [GiB]: torch's allocations on its GPU, or resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage, whose peak on Linux starts from that of the parent process.
        (peak,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak) * 1024 / 2**30
    # macOS counts in bytes, other systems in KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
