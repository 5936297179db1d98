"""Sends updated weights to data-parallel peers while the next step begins.

This replaces the all-gather at the end of DeepSpeed's ZeRO-1 step, for which everything waits. Each bucket of weights,
the same range of a flat tensor as that of gradients (buckets.py), is broadcast by the rank that has stepped it, those
of the first layers first, and a layer waits for its own before it runs forward. On a ring this moves what an all-gather
does; of two ranks alone, who could both send at the same time, one sends after the other.

Weights in flight must not be read. So a step ends with a wait for all of them, except inside `overlapping`, where the
loop of a run takes its steps: what evaluates, samples or saves there goes through the engine or the layers of
`CausalLMPipeline`, which wait first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, distributed

from megatron.model.pipeline import CausalLMPipeline, WeightsAtHand
from megatron.mpu.context import ParallelContext
from megatron.training.gradients.reduction import GradientReduction

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


class WeightGathering(WeightsAtHand):
    """The weights of one engine's stage on their way."""

    def __init__(self, engine: PipelineEngine, reduction: GradientReduction, context: ParallelContext) -> None:
        """Takes the place of the engine's own gathering."""
        self._context = context
        self._buckets = list(reversed(reduction.buckets))
        self._flat: list[Tensor] = reduction.gradients.flat_weights
        self._works: list[Any] = []
        self._arrived = 0
        self._may_overlap = False
        pipeline: CausalLMPipeline = engine.module
        last = len(self._buckets) - 1
        self._needed = [
            max((last - number + 1 for weight in layer for number in reduction.buckets_of[weight]), default=0)
            for layer in pipeline.layer_parameters()
        ]
        """Buckets that have to arrive before each layer runs, of all in their order."""
        if context.data_group is not None:
            pipeline.weights = self
            self._install(engine)

    def _install(self, engine: PipelineEngine) -> None:
        module: Any = sys.modules[type(engine.optimizer).__module__]
        step, train = engine.optimizer.step, engine.train_batch

        def step_and_send(closure: Any = None) -> None:
            # The function is the module's, and called at the end of a step that is taken.
            own = module.all_gather_dp_groups
            module.all_gather_dp_groups = lambda *_, **__: self.send()
            try:
                step(closure)
            finally:
                module.all_gather_dp_groups = own

        def train_batch(data_iter: Any = None) -> Tensor:
            loss: Tensor = train(data_iter)
            if not self._may_overlap:
                self.wait()
            return loss

        engine.optimizer.step, engine.train_batch = step_and_send, train_batch
        for name in ("eval_batch", "save_checkpoint", "load_checkpoint"):
            setattr(engine, name, self._after_arrival(getattr(engine, name)))

    def _after_arrival(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(*arguments: Any, **named: Any) -> Any:
            self.wait()
            return method(*arguments, **named)

        return waiting

    @contextmanager
    def overlapping(self) -> Iterator[None]:
        """Lets steps end inside while weights are on their way."""
        self._may_overlap = True
        try:
            yield
        finally:
            self._may_overlap = False
            self.wait()

    def send(self) -> None:
        """Sends this rank's part of the weights, and begins to receive the others. Collective over data ranks."""
        self._arrived = 0
        ranks = self._context.data_group
        if ranks is None:
            return
        self._works = [
            distributed.broadcast(
                self._flat[bucket.group][bucket.place],
                src=distributed.get_global_rank(ranks, bucket.owner),
                group=ranks,
                async_op=True,
            )
            for bucket in self._buckets
        ]

    def wait_for(self, layer: int) -> None:
        """Waits for the weights of one of the stage's layers, by its number there, and of those before it."""
        self._wait(self._needed[layer])

    def wait(self) -> None:
        """Waits for all weights."""
        self._wait(len(self._works))

    def _wait(self, count: int) -> None:
        while self._arrived < min(count, len(self._works)):
            self._works[self._arrived].wait()
            self._arrived += 1
