"""Layer normalization (Ba et al. 2016, arXiv:1607.06450)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from megatron.kernels.backends import Operation

LayerNormFunction = Callable[[Tensor, Sequence[int], Tensor | None, Tensor | None, float], Tensor]
"""(x, normalized shape, weight, bias, epsilon) -> (x - mean) / sqrt(variance + epsilon) * weight + bias, the variance
biased: the signature of torch.nn.functional.layer_norm."""

LAYER_NORM: Operation[LayerNormFunction] = Operation("layer norm", package="megatron.kernels.layer_norm.backends")
