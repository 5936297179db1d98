"""Feed-forward sublayers: of two matrices, and gated ones of three."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.architectures.llama import feed_forward_width
from megatron.config.sections.model import ModelConfig
from megatron.model.init_methods import input_initializer, output_initializer
from megatron.mpu.context import ParallelContext
from megatron.mpu.layers import ColumnParallelLinear, RowParallelLinear, column_parallel_outputs
from megatron.registry import Registry

ACTIVATIONS: Registry[Callable[[Tensor], Tensor]] = Registry("activation")
ACTIVATIONS.register("gelu")(F.gelu)
ACTIVATIONS.register("gelu_tanh")(partial(F.gelu, approximate="tanh"))

GATES: Registry[Callable[[Tensor], Tensor]] = Registry("gated activation")
"""By the name of the activation: the function on the gate."""
GATES.register("swiglu")(F.silu)


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


class GatedMLP(nn.Module):
    """y = (gate(x W_g^T + b_g) * (x W_u^T + b_u)) W_d^T + b_d with ffn_hidden_size features inside.

    Residual stream in and out. SwiGLU's gate is SiLU (Shazeer 2020, arXiv:2002.05202).
    """

    def __init__(self, model: ModelConfig, context: ParallelContext) -> None:
        super().__init__()
        width, inside, bias = model.hidden_size, feed_forward_width(model), model.use_bias_in_mlp
        self.activation = GATES[model.activation]
        self.gate = ColumnParallelLinear(width, inside, bias, input_initializer(model), context)
        self.up = ColumnParallelLinear(width, inside, bias, input_initializer(model), context)
        self.down = RowParallelLinear(inside, width, bias, output_initializer(model), context)

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate_BSN, up_BSN = column_parallel_outputs(x_BSD, [self.gate, self.up])
        y_BSD: Tensor = self.down(self.activation(gate_BSN) * up_BSN)
        return y_BSD
