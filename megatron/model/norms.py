"""Normalizations of the residual stream.

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.sections.model import ModelConfig
from megatron.kernels.layer_norm.layer_norm import LayerNormFunction
from megatron.mpu.collectives import residual_weight
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import new_parameter, ones, zeros
from megatron.registry import Registry

NORMS: Registry[type[nn.Module]] = Registry("norm")
"""Classes built from (ModelConfig, ParallelContext)."""


@NORMS.register("layernorm")
class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension; biased variance.

    Without `use_bias_in_norms` nothing is added.
    """

    def __init__(self, model: ModelConfig, context: ParallelContext) -> None:
        super().__init__()
        self.epsilon = model.layernorm_epsilon
        self.normalize: LayerNormFunction = F.layer_norm
        self.context = context
        shape = (model.hidden_size,)
        self.weight = new_parameter(shape, ones, context, what="norm scale", decays=False)
        self.bias = (
            new_parameter(shape, zeros, context, what="norm bias", decays=False) if model.use_bias_in_norms else None
        )

    def forward(self, x_BSD: Tensor) -> Tensor:
        weight_D = residual_weight(self.weight, self.context)
        bias_D = None if self.bias is None else residual_weight(self.bias, self.context)
        return self.normalize(x_BSD, weight_D.shape, weight_D, bias_D, self.epsilon)


@NORMS.register("layernorm_nonparam")
class NonParametricLayerNorm(nn.Module):
    """y = (x - mean) / sqrt(variance + eps), TokenFormer's norm inside the layers."""

    def __init__(self, model: ModelConfig, context: ParallelContext) -> None:
        super().__init__()
        self.epsilon = model.layernorm_epsilon
        self.normalize: LayerNormFunction = F.layer_norm

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.normalize(x_BSD, x_BSD.shape[-1:], None, None, self.epsilon)


@NORMS.register("rmsnorm")
class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, model: ModelConfig, context: ParallelContext) -> None:
        super().__init__()
        self.epsilon = model.rms_norm_epsilon
        self.context = context
        self.weight = new_parameter((model.hidden_size,), ones, context, what="norm scale", decays=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        weight_D = residual_weight(self.weight, self.context)
        return F.rms_norm(x_BSD, weight_D.shape, weight_D, self.epsilon)
