"""Parts of a transformer layer, as data.

An architecture is one module in `architectures/`: it registers a function from the model's configuration to the parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from megatron.config.sections.model import ModelConfig
from megatron.model.attention import SelfAttention
from megatron.mpu.context import ParallelContext
from megatron.registry import Registry

Builder = Callable[[ModelConfig, ParallelContext], nn.Module]
"""Builds a sublayer; its parameters are unset."""


@dataclass(frozen=True)
class TransformerLayerSpec:
    """Builders of a layer's parts."""

    norm: Builder
    """Before attention and before the feed-forward sublayer."""
    attention: Callable[[ModelConfig, ParallelContext, int], SelfAttention]
    """Causal self-attention of the layer at an index of the whole model; residual stream in and out."""
    mlp: Builder
    """Feed-forward sublayer, residual stream in and out."""


ARCHITECTURES: Registry[Callable[[ModelConfig], TransformerLayerSpec]] = Registry(
    "architecture", package="megatron.model.architectures"
)
