"""Sums a step's gradients over data-parallel ranks while its last backward pass still runs.

This is what it replaces of DeepSpeed 0.19.8, whose pipeline engine starts nothing before the last backward pass has
ended ("Pipeline parallelism does not support overlapped communication"; `overlap_comm`, forced, gives a wrong norm):

- Accumulation. ZeRO's hooks and the loop of `BF16_Optimizer.update_hp_grads` after each backward pass, which keep a
  gradient in the weights' format beside the fp32 one, and make all of them zero twice in a step. Here one hook adds to
  a flat fp32 tensor (flat_gradients.py).
- `ReduceGrads`. Under fp32 and fp16 an all-reduce of everything through two new buffers of `reduce_bucket_size`
  elements, also for one rank alone; under bf16 an all-reduce of a copy of everything. Here each bucket is reduced to
  the rank that steps it (buckets.py), half the bytes, where it lies, as soon as its last gradient has come.
- After that a rank has sums in its own part alone. So the norm reads that part (slice_norm.py), as does clipping, and
  fp16's search for an overflow in it, with two collectives of its own, is left to the norm, which is finite only if
  all gradients are.
- `ReduceTiedGrads`. The stages of a tied weight sum its gradients before data-parallel ranks do: its buckets wait for
  that.

Each rank's own gradients are gone once they are on the wire. The step guard, which says whose were not finite, hears of
it from a look at each bucket before it is sent. `deepspeed_patches.py` puts this into an engine.

Sums are divided by the number of ranks afterwards, on a rank's own part. Where that number is a power of two, nothing
is rounded by it. With two ranks all sums are those of an all-reduce; with more, the order of the summands, and with
three, five and so on the place of the division, are others, in the last bit of fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import DTYPES
from megatron.training.gradients.buckets import Bucket, Member, plan_buckets
from megatron.training.gradients.flat_gradients import FlatGradients

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


@dataclass(frozen=True)
class _Sent:
    """A bucket on the wire."""

    bucket: Bucket
    wire: Tensor
    """Its elements: a part of the flat gradient, or a copy in the format of the wire."""
    work: Any


class GradientReduction:
    """The gradients of one engine's stage, over a step: taken, looked at, sent, received."""

    def __init__(self, engine: PipelineEngine, context: ParallelContext, largest_bucket: int, wire_format: str) -> None:
        """Takes the most elements of a bucket, and the name of the number format in which they travel."""
        self._engine, self._context = engine, context
        self._wire_dtype = DTYPES[wire_format]
        self.gradients = FlatGradients(engine.optimizer, self._count)
        groups, flat = self.gradients.groups, self.gradients.flat
        order = {parameter: number for number, parameter in enumerate(engine.module.parameters())}
        self._tied: list[tuple[nn.Parameter, Any]] = list(engine.module.get_tied_weights_and_groups())
        tied = {weight for weight, _ in self._tied}
        part_sizes = [tensor.numel() // context.data_size for tensor in flat]
        members = [
            [Member(order[parameter], parameter.numel(), parameter in tied) for parameter in parameters]
            for parameters in groups
        ]
        self.slices = [
            tensor.narrow(0, context.data_rank * size, size) for tensor, size in zip(flat, part_sizes, strict=True)
        ]
        """This rank's part of each flat gradient: after `finish` the means over the ranks."""
        self.buckets = plan_buckets(members, part_sizes, largest_bucket)
        self.buckets_of: dict[nn.Parameter, list[int]] = {parameter: [] for parameter in self.gradients.views}
        """Numbers of the buckets that a parameter lies in."""
        for number, bucket in enumerate(self.buckets):
            for member in bucket.members:
                self.buckets_of[groups[bucket.group][member]].append(number)
        self._passes = 0
        self._begin_step()

    def _begin_step(self) -> None:
        self._passes = 0
        self._missing = [len(bucket.members) for bucket in self.buckets]
        self._seen: list[Tensor] = []
        self._sent: list[_Sent] = []
        self._next = 0

    def begin_backward(self) -> None:
        """Counts a backward pass that begins. In the last one of the step gradients are complete, one after another."""
        self._passes += 1

    def _count(self, parameter: nn.Parameter) -> None:
        """Sends what is complete now that a gradient has come, in the order that all ranks share."""
        if self._passes < self._engine.micro_batches:
            return
        for number in self.buckets_of[parameter]:
            if number < self._next:
                raise RuntimeError("a gradient has come twice in one backward pass, as in reentrant recomputation")
            self._missing[number] -= 1
        while self._next < len(self.buckets) and not self._missing[self._next] and not self.buckets[self._next].is_tied:
            self._look_at(self.buckets[self._next])
            self._send(self.buckets[self._next])
            self._next += 1

    def end_backward(self) -> Tensor:
        """Sends the rest, but for tied weights; returns whether a gradient of this rank was not finite, a boolean.

        What no micro batch has had a gradient of counts as zero. Before the next step the caller must `sum_tied` and
        `finish`. Collective over the data-parallel ranks.
        """
        self.gradients.clear_absent()
        for bucket in self.buckets[self._next :]:
            self._look_at(bucket)
            if not bucket.is_tied:
                self._send(bucket)
        return ~torch.isfinite(torch.cat(self._seen)).all()

    def sum_tied(self) -> None:
        """Sums the gradients of tied weights over the stages that share them. Collective over those."""
        for weight, group in self._tied:
            distributed.all_reduce(self.gradients.views[weight], group=group)

    def finish(self) -> None:
        """Sends tied weights and waits until this rank's slices have the means. Collective over data-parallel ranks."""
        for bucket in self.buckets:
            if bucket.is_tied:
                self._send(bucket)
        for sent in self._sent:
            sent.work.wait()
            if sent.bucket.owner == self._context.data_rank and sent.wire.dtype != torch.float32:
                self._elements(sent.bucket).copy_(sent.wire)
        if self._context.data_size > 1:
            for mean in self.slices:
                mean.mul_(1.0 / self._context.data_size)
        self.gradients.begin_step()
        self._begin_step()

    def _elements(self, bucket: Bucket) -> Tensor:
        return self.gradients.flat[bucket.group][bucket.place]

    def _look_at(self, bucket: Bucket) -> None:
        # A range is not finite where an element is not: torch's maximum hands NaN on. It is read once, where a norm of
        # infinite order takes several times as long on CPUs.
        self._seen += [extreme.reshape(1) for extreme in torch.aminmax(self._elements(bucket))]

    def _send(self, bucket: Bucket) -> None:
        if self._context.data_group is None:
            return
        wire = self._elements(bucket).to(self._wire_dtype)
        owner = distributed.get_global_rank(self._context.data_group, bucket.owner)
        work = distributed.reduce(wire, dst=owner, group=self._context.data_group, async_op=True)
        self._sent.append(_Sent(bucket, wire, work))
