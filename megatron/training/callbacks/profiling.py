"""Writes traces of a few steps (`profile`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import distributed
from torch.profiler import ProfilerActivity, profile, record_function

from megatron.errors import EnvironmentSetupError, UserError, os_errors_as
from megatron.mpu.agreement import on_first_rank
from megatron.training.callback import Callback
from megatron.training.progress import Step
from megatron.training.training_context import TrainingContext

logger = logging.getLogger(__name__)

FOLDER = "profile"
MOST_ALLOCATIONS = 1_000_000
"""Entries of the allocator's history that are kept, the newest ones."""


class Profile(Callback):
    """Profiles the steps from profile_step_start to profile_step_stop on every rank, or as many as are taken.

    Raises EnvironmentSetupError where a file cannot be written.
    """

    def __init__(self, context: TrainingContext) -> None:
        super().__init__(context)
        self.config = context.run.config.monitor.profile
        self.folder = context.run.folder / FOLDER
        self._running: ExitStack | None = None
        self._first = 0

    def start(self) -> None:
        """Begins, where the next step is to be profiled."""
        if self.config.memory and not torch.cuda.is_available():
            logger.info("memory_profiling: torch keeps no history of a CPU's memory; the trace has its allocations")
        self._begin_before(self.context.progress.iteration + 1)

    def after_step(self, step: Step) -> None:
        """Begins or ends, when it is time."""
        if step.iteration == self.config.step_stop:
            self._end(step.iteration)
        self._begin_before(step.iteration + 1)

    def finish(self) -> None:
        """Ends with the run."""
        self._end(self.context.progress.iteration)

    def on_error(self, error: UserError) -> None:
        """Stops, without a trace of steps that are not whole."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _begin_before(self, iteration: int) -> None:
        if self._running is not None or not self.config.step_start <= iteration <= self.config.step_stop:
            return
        on_first_rank(self._make_folder)
        self._first = iteration
        with ExitStack() as stack:
            stack.enter_context(self.context.run.parts.observed(_marked))
            if torch.cuda.is_available():
                if self.config.memory:
                    stack.enter_context(self._memory_history())
                stack.enter_context(_captured_by_nsys())
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profiler = stack.enter_context(
                profile(activities=activities, record_shapes=True, profile_memory=True)
            )
            self._running = stack.pop_all()

    def _end(self, iteration: int) -> None:
        running, self._running = self._running, None
        if running is None or iteration < self._first:
            return
        with os_errors_as(EnvironmentSetupError, str(self.folder)):
            running.close()
            self._profiler.export_chrome_trace(str(self._file("trace.json.gz")))
        logger.info("steps %d to %d are profiled: %s, a trace for each rank", self._first, iteration, self.folder)

    def _make_folder(self) -> None:
        with os_errors_as(EnvironmentSetupError, str(self.folder)):
            self.folder.mkdir(parents=True, exist_ok=True)

    def _file(self, ending: str) -> Path:
        return self.folder / f"step{self._first}.rank{distributed.get_rank()}.{ending}"

    @contextmanager
    def _memory_history(self) -> Iterator[None]:
        torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
        yield
        torch.cuda.memory._dump_snapshot(str(self._file("memory.pickle")))  # type: ignore[no-untyped-call]
        torch.cuda.memory._record_memory_history(enabled=None)


@contextmanager
def _marked(part: str) -> Iterator[None]:
    """Gives a part its name in torch's trace and in Nsight's."""
    with ExitStack() as stack:
        stack.enter_context(record_function(part))
        if torch.cuda.is_available():
            stack.enter_context(torch.cuda.nvtx.range(part))
        yield


@contextmanager
def _captured_by_nsys() -> Iterator[None]:
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    cudart.cudaProfilerStart()
    yield
    torch.cuda.synchronize()
    cudart.cudaProfilerStop()
