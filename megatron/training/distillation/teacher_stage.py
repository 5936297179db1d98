"""A rank's part of the teacher: its pipeline stage, which hands what it computes on to the stage of the student's loss.

Before each step the teacher runs forward over the step's micro batches, stage after stage, in the student's layout; the
last stage keeps its output, the head's input, and computes logits of it when the student's loss needs them. So the
engine's schedule stays as it is, and between stages goes what goes between stages of a model: the residual stream.

Shape letters: see megatron/README.md; D is the teacher's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import cast

import torch
from torch import Tensor, distributed, nn

from megatron.checkpointing.states.load_parameters import load_layers, load_parameters
from megatron.config.sections.parallel import ParallelConfig
from megatron.config.sections.training import PrecisionConfig
from megatron.data.micro_batch import MicroBatch
from megatron.errors import CheckpointError, ConfigError
from megatron.model.causal_lm import layer_entries
from megatron.model.embedding import Head, TiedHead, TokenEmbedding, tied_logits
from megatron.model.pipeline import layer_specs, stage_bounds
from megatron.model.speedups import Speedups, apply_speedups
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import DTYPES
from megatron.training.distillation.find_teacher import Teacher


class TeacherStage:
    """Layers of a teacher on this rank: frozen, without dropout, in the run's number format, split as the student's.

    Collective over the ranks of a pipeline. Raises CheckpointError for weights that are damaged or not finite, and
    ConfigError where the layers do not split over the stages.
    """

    def __init__(
        self,
        teacher: Teacher,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        speedups: Speedups,
        context: ParallelContext,
        device: torch.device,
        micro_batch_size: int,
    ) -> None:
        entries = layer_entries(teacher.model, teacher.vocab, context)
        specs = layer_specs(entries, teacher.model)
        try:
            bounds = stage_bounds(specs, parallel.pipe_partition_method, context.pipe_size)
        except ConfigError as error:
            raise ConfigError(f"distillation.teacher: {teacher.path}: {error}") from error
        own = range(bounds[context.pipe_rank], bounds[context.pipe_rank + 1])
        with device:
            built = {index: entries[index].build() for index in own}
        head = built.get(len(entries) - 1)
        if isinstance(head, TiedHead) and 0 in built:
            head.word_embeddings = cast(TokenEmbedding, built[0]).word_embeddings
        self.context, self.device, self.micro_batch_size = context, device, micro_batch_size
        self.model, self.dtype = teacher.model, DTYPES[precision.dtype]
        self.modules = nn.ModuleDict({str(index): module for index, module in built.items()})
        self.modules.to(self.dtype).eval().requires_grad_(False)
        names = {str(index): entries[index].name for index in built}
        _load(teacher, [(_global(name, names), p) for name, p in self.modules.named_parameters()], context)
        apply_speedups(self.modules, replace(speedups, compile=False))
        self._head = head
        self._body = [module for index, module in built.items() if index < len(entries) - 1]

    def attach(self, batches: Iterator[MicroBatch], count: int) -> Iterator[MicroBatch]:
        """Returns the next `count` micro batches; on the last stage, with the teacher's output as a third target.

        Only the first and the last stage have micro batches to read; the others return an empty iterator. Collective
        over the ranks of a pipeline, at once where it has several stages.
        """
        taught = self._taught(islice(batches, count), count)
        return taught if self.context.pipe_size == 1 else iter(list(taught))

    @torch.no_grad()
    def local_logits(self, output_BSD: Tensor) -> Tensor:
        """Computes this rank's share of the logits [B, S, V/tp] from the teacher's output, on the last stage."""
        if isinstance(self._head, TiedHead):
            return tied_logits(self._head, output_BSD)
        logits_BSv: Tensor = cast(Head, self._head)(output_BSD)
        return logits_BSv

    def _taught(self, batches: Iterator[MicroBatch], count: int) -> Iterator[MicroBatch]:
        stage, last = self.context.pipe_rank, self.context.pipe_size - 1
        for _ in range(count):
            batch = next(batches) if stage in (0, last) else None
            output_BSD = self._forward(None if batch is None else batch[0])
            if stage < last:
                distributed.send(output_BSD.contiguous(), self._neighbour(1))
            if batch is not None:
                inputs_BS, targets = batch
                # The engine hands any number of targets on to the loss.
                yield inputs_BS, cast(tuple[Tensor, Tensor], (*targets, output_BSD) if stage == last else targets)

    @torch.no_grad()
    def _forward(self, tokens_BS: Tensor | None) -> Tensor:
        if self.context.pipe_rank == 0:
            x_BSD = cast(Tensor, tokens_BS).to(self.device)
        else:
            positions = self.model.seq_length // (self.context.tensor_size if self.context.sequence_parallel else 1)
            shape = (self.micro_batch_size, positions, self.model.hidden_size)
            x_BSD = torch.empty(shape, dtype=self.dtype, device=self.device)
            distributed.recv(x_BSD, self._neighbour(-1))
        for module in self._body:
            x_BSD = module(x_BSD)
        return x_BSD

    def _neighbour(self, step: int) -> int:
        """Returns the global rank at this rank's place in the stage `step` stages on."""
        return distributed.get_rank() + step * self.context.tensor_size * self.context.data_size


def _global(name: str, prefixes: dict[str, str]) -> str:
    index, _, local = name.partition(".")
    return f"{prefixes[index]}.{local}"


def _load(teacher: Teacher, named: list[tuple[str, nn.Parameter]], context: ParallelContext) -> None:
    if teacher.checkpoint is not None:
        load_parameters(named, teacher.checkpoint, context)
    elif teacher.layers is not None:
        load_layers(named, teacher.layers(), teacher.vocab.actual, context)
    for name, parameter in named:
        if not torch.isfinite(parameter).all():
            raise CheckpointError(
                f"distillation.teacher: {teacher.path}: {name} holds NaN, infinity, or numbers too large for "
                f"{parameter.dtype}. Choose another teacher."
            )
