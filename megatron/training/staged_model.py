"""The model of a run between two of its steps, as text is generated with it: over its stages, in any layout.

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from megatron.model.causal_lm import VocabSize
from megatron.model.embedding import TokenEmbedding
from megatron.model.kv_cache import KeyValueCache
from megatron.model.layer import TransformerLayer
from megatron.model.pipeline import CausalLMPipeline
from megatron.mpu.collectives import gather_output
from megatron.mpu.context import ParallelContext

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


class StagedModel:
    """A run's own layers, each stage's on its ranks; all ranks of a pipeline make the same calls.

    Between stages goes the residual stream, and from the last one to all others the logits, so that every rank chooses
    the same tokens. The engine is not asked, and nothing of it changes: weights are read, and no gradient is kept.
    """

    def __init__(self, engine: PipelineEngine, vocab: VocabSize, context: ParallelContext) -> None:
        self.context = context
        self.device: torch.device = engine.device
        self.vocab = vocab
        self._pipeline = cast(CausalLMPipeline, engine.module)
        self._stages = engine.grid.get_pipe_parallel_group()
        self._layers = [layer for layer in self._pipeline.body() if isinstance(layer, TransformerLayer)]
        self._dtype = next(self._pipeline.parameters()).dtype
        self.context_length: int = self._pipeline.model_config.seq_length
        """Longest sequence to give it [tokens]."""

    @property
    def takes_cache(self) -> bool:
        """Tells whether a cache can be used: a sequence that is split over ranks cannot go on by a single token."""
        return not self.context.sequence_parallel

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Puts the layers into evaluation, and back into training in the end.

        Nothing is compiled meanwhile: inputs have too many shapes.
        """
        self._pipeline.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self._pipeline.train()

    def new_cache(self, batch: int, capacity: int, padding_B: Tensor | None = None) -> KeyValueCache:
        """Makes an empty cache for `batch` sequences of up to `capacity` columns, as this stage's layers fill it."""
        attention = self._layers[0].attention if self._layers else None
        return KeyValueCache(
            num_layers=len(self._layers),
            batch=batch,
            num_kv_heads=1 if attention is None else attention.num_kv_heads,
            capacity=capacity,
            head_size=1 if attention is None else attention.head_size,
            dtype=self._dtype,
            device=self.device,
            padding_B=padding_B,
        )

    def next_logits(
        self, tokens_BS: Tensor, cache: KeyValueCache | None = None, *, lengths_B: Tensor | None = None
    ) -> Tensor:
        """Computes float32 logits [B, V] of the token after the last one, or after the first `lengths_B`.

        Collective over the ranks of a pipeline and its tensor-parallel peers.
        """
        batch, length = tokens_BS.shape
        last_B = torch.full((batch,), length) if lengths_B is None else lengths_B
        if self.context.sequence_parallel:
            tokens_BS = F.pad(tokens_BS, (0, -length % self.context.tensor_size))
        x_BSD = self._forward(tokens_BS, cache)
        logits_BV = torch.empty(batch, self.vocab.actual, device=self.device)
        if self._pipeline.has_head:
            whole_BSD, weight_vD = self._pipeline.head_factors(x_BSD)
            last_BD = whole_BSD[torch.arange(batch, device=self.device), last_B.to(self.device) - 1]
            gathered_BV = gather_output(F.linear(last_BD, weight_vD), -1, self.context)
            logits_BV = gathered_BV[:, : self.vocab.actual].float().contiguous()
        if self.context.pipe_size > 1:
            last_stage = self._rank_of(self.context.pipe_size - 1)
            distributed.broadcast(logits_BV, src=last_stage, group=self._stages)
        return logits_BV

    def _forward(self, tokens_BS: Tensor, cache: KeyValueCache | None) -> Tensor:
        """Runs this stage's layers on what the stage before it sends, and sends the result on to the next."""
        stage, (batch, length) = self.context.pipe_rank, tokens_BS.shape
        if cache is not None:
            cache.begin(length)
        if stage == 0:
            x_BSD = tokens_BS.to(self.device)
        else:
            positions = length // (self.context.tensor_size if self.context.sequence_parallel else 1)
            shape = (batch, positions, self._pipeline.model_config.hidden_size)
            x_BSD = torch.empty(shape, dtype=self._dtype, device=self.device)
            distributed.recv(x_BSD, self._rank_of(stage - 1))
        own = iter(cache.layers) if cache is not None else None
        for layer in self._pipeline.body():
            if own is not None and isinstance(layer, TransformerLayer):
                x_BSD = layer(x_BSD, next(own))
            elif isinstance(layer, TokenEmbedding):
                x_BSD = layer(x_BSD, cache)
            else:
                x_BSD = layer(x_BSD)
        if stage < self.context.pipe_size - 1:
            distributed.send(x_BSD.contiguous(), self._rank_of(stage + 1))
        return x_BSD

    def _rank_of(self, stage: int) -> int:
        """Returns the global rank at this rank's place in another stage."""
        step = stage - self.context.pipe_rank
        return distributed.get_rank() + step * self.context.tensor_size * self.context.data_size
