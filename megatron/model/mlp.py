"""Two-matrix feed-forward sublayer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.sections.model import ModelConfig
from megatron.model.init_methods import input_initializer, output_initializer
from megatron.mpu.context import ParallelContext
from megatron.mpu.layers import ColumnParallelLinear, RowParallelLinear
from megatron.registry import Registry

ACTIVATIONS: Registry[Callable[[Tensor], Tensor]] = Registry("activation")
ACTIVATIONS.register("gelu")(F.gelu)
ACTIVATIONS.register("gelu_tanh")(partial(F.gelu, approximate="tanh"))


class MLP(nn.Module):
    """y = activation(x W_1^T + b_1) W_2^T + b_2 with 4 d features inside; residual stream in and out."""

    def __init__(self, model: ModelConfig, context: ParallelContext) -> None:
        super().__init__()
        width, bias = model.hidden_size, model.use_bias_in_mlp
        self.activation = ACTIVATIONS[model.activation]
        self.dense_h_to_4h = ColumnParallelLinear(width, 4 * width, bias, input_initializer(model), context)
        self.dense_4h_to_h = RowParallelLinear(4 * width, width, bias, output_initializer(model), context)

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD: Tensor = self.dense_4h_to_h(self.activation(self.dense_h_to_4h(x_BSD)))
        return y_BSD
