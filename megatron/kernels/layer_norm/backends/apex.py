"""Layer normalization by NVIDIA's apex, on its GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.kernels.backends import INSTALL, Backend
from megatron.kernels.layer_norm.layer_norm import LAYER_NORM, LayerNormFunction
from megatron.registry import require


def load() -> LayerNormFunction:
    """Imports apex. Raises EnvironmentSetupError when it is not installed."""
    apex = require("apex.normalization.fused_layer_norm", "apex_fused_layernorm: on", INSTALL)

    def layer_norm(
        x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, epsilon: float
    ) -> Tensor:
        if weight is None:
            plain: Tensor = apex.fused_layer_norm(x, shape, epsilon)
            return plain
        # apex has no kernel for a scale without a bias.
        offset = torch.zeros_like(weight) if bias is None else bias
        affine: Tensor = apex.fused_layer_norm_affine(x, weight, offset, shape, epsilon)
        return affine

    return layer_norm


LAYER_NORM.register("apex")(
    Backend(
        label="apex",
        rank=1,
        key="apex_fused_layernorm",
        package="apex",
        gpu="required",
        dtypes=("fp32", "bf16", "fp16"),
        load=load,
    )
)
