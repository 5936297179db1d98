"""Parts of a training step, as the pipeline engine takes them: for what times them, and what marks them in traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.pipe import schedule
from torch import distributed

from megatron.mpu.waiting_time import WaitingTime, waiting_time

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

PARTS: Mapping[type, str] = {
    schedule.LoadMicroBatch: "data",
    schedule.ForwardPass: "forward",
    schedule.BackwardPass: "backward",
    schedule.SendActivation: "transfer",
    schedule.RecvActivation: "transfer",
    schedule.SendGrad: "transfer",
    schedule.RecvGrad: "transfer",
    schedule.ReduceTiedGrads: "reduce",
    schedule.ReduceGrads: "reduce",
    schedule.OptimizerStep: "step",
}
"""Names of the engine's instructions. In `reduce`, data-parallel ranks also wait for each other."""
NAMES = tuple(dict.fromkeys(PARTS.values()))
Observer = Callable[[str], AbstractContextManager[object]]
"""Returns what is entered around a part of the given name."""


class StepParts:
    """The parts of an engine's steps, and their observers. Without observers the engine is as it was."""

    def __init__(self, engine: PipelineEngine) -> None:
        self._engine = engine
        self._instructions: Mapping[type, Callable[..., None]] = {}
        self._observers: list[Observer] = []

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Lets `observer` see the parts of every step that is taken inside, evaluations apart."""
        if not self._observers:
            self._instructions = self._engine._INSTRUCTION_MAP
        self._observers.append(observer)
        self._engine._INSTRUCTION_MAP = {
            kind: self._observed(method, PARTS[kind]) for kind, method in self._instructions.items()
        }
        try:
            yield
        finally:
            self._observers.remove(observer)
            if not self._observers:
                self._engine._INSTRUCTION_MAP = self._instructions

    def _observed(self, method: Callable[..., None], part: str) -> Callable[..., None]:
        def instruction(engine: PipelineEngine, **arguments: Any) -> None:
            with ExitStack() as stack:
                if engine.module.training:
                    for observer in self._observers:
                        stack.enter_context(observer(part))
                method(engine, **arguments)

        return instruction


class PartTimes:
    """Time that this rank spends in each part of its steps, on its device."""

    def __init__(self, iteration: int) -> None:
        """Begins after step `iteration`."""
        self._times: dict[str, WaitingTime] = {part: waiting_time() for part in NAMES}
        self._iteration = iteration
        self._before = torch.zeros(len(NAMES), dtype=torch.float64)

    @contextmanager
    def observe(self, part: str) -> Iterator[None]:
        """Times a part."""
        mark = self._times[part].begin()
        yield
        self._times[part].end(mark)

    def measure(self, iteration: int, save_seconds: float, device: torch.device) -> dict[str, float]:
        """Returns the seconds of each part per step since the last call, mean over the ranks. Collective.

        `save_seconds` is what training has waited for saves since then [s]. A GPU's time is counted once it has come
        to the end of a part.
        """
        steps = max(iteration - self._iteration, 1)
        now = torch.tensor([each.seconds() for each in self._times.values()], dtype=torch.float64)
        spent = ((now - self._before) / steps).to(device)
        distributed.all_reduce(spent)
        self._before, self._iteration = now, iteration
        means = (spent / distributed.get_world_size()).tolist()
        parts = {f"time/{part}": seconds for part, seconds in zip(NAMES, means, strict=True)}
        return parts | {"time/save": save_seconds / steps}
