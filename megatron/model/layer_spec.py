"""What a transformer layer is made of, as data; architectures are registered functions that return it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from megatron.config.sections.model import ModelConfig
from megatron.mpu.context import ParallelContext
from megatron.registry import Registry

Builder = Callable[[ModelConfig, ParallelContext], nn.Module]
"""Makes a sublayer; its parameters are unset."""


@dataclass(frozen=True)
class TransformerLayerSpec:
    """Builders of a layer's parts."""

    norm: Builder
    """Before attention and before the feed-forward sublayer."""
    attention: Builder
    """Causal self-attention, residual stream in and out."""
    mlp: Builder
    """Feed-forward sublayer, residual stream in and out."""


ARCHITECTURES: Registry[Callable[[ModelConfig], TransformerLayerSpec]] = Registry(
    "architecture", package="megatron.model.architectures"
)
