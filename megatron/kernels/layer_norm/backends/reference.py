"""Layer normalization spelled out, for comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.kernels.backends import Backend
from megatron.kernels.layer_norm.layer_norm import LAYER_NORM


def layer_norm_reference(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> Tensor:
    """Computes (x - mean) / sqrt(variance + epsilon) * weight + bias over the last dimensions, which have `shape`.

    The variance is biased. Computes in float32 (float64 for float64) and returns the dtype of x.
    """
    dims = tuple(range(-len(shape), 0))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(dims, keepdim=True)
    y = centred / (centred.square().mean(dims, keepdim=True) + epsilon).sqrt()
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


LAYER_NORM.register("reference")(Backend(label="reference", rank=None, load=lambda: layer_norm_reference))
