"""A transformer layer: attention and feed-forward sublayer around the residual stream.

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.sections.model import ModelConfig
from megatron.model.kv_cache import LayerCache
from megatron.model.layer_spec import ARCHITECTURES
from megatron.mpu.context import ParallelContext
from megatron.mpu.random import split_activations


class TransformerLayer(nn.Module):
    """Pre-norm sublayers that add to the residual stream [B, S or S/tp, D].

    Sequential: x += attention(norm(x)), then x += mlp(norm(x)). Parallel residual (GPT-J, GPT-NeoX): both sublayers
    read the same x. Hidden dropout applies to each sublayer's output. `layer_index` counts the layers of the whole
    model from 0.
    """

    def __init__(self, model: ModelConfig, context: ParallelContext, layer_index: int) -> None:
        super().__init__()
        spec = ARCHITECTURES[model.architecture](model)
        self.parallel_residual = model.parallel_residual
        self.input_layernorm = spec.norm(model, context)
        self.attention = spec.attention(model, context, layer_index)
        self.post_attention_layernorm = spec.norm(model, context)
        self.mlp = spec.mlp(model, context)
        self.dropout = HiddenDropout(model.hidden_dropout, context)

    def forward(self, x_BSD: Tensor, cache: LayerCache | None = None) -> Tensor:
        attended_BSD = x_BSD + self.dropout(self.attention(self.input_layernorm(x_BSD), cache))
        mlp_input_BSD = x_BSD if self.parallel_residual else attended_BSD
        y_BSD: Tensor = attended_BSD + self.dropout(self.mlp(self.post_attention_layernorm(mlp_input_BSD)))
        return y_BSD


class HiddenDropout(nn.Module):
    """Dropout on the residual stream; tensor-parallel ranks that hold the same part of it draw the same mask."""

    def __init__(self, probability: float, context: ParallelContext) -> None:
        super().__init__()
        self.probability = probability
        self.context = context

    def forward(self, x_BSD: Tensor) -> Tensor:
        if not (self.training and self.probability):
            return x_BSD
        with split_activations(self.context) if self.context.sequence_parallel else nullcontext():
            return F.dropout(x_BSD, self.probability)
