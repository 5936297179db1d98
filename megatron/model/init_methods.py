"""Initializers of weights, by GPT-NeoX's formulas (its megatron/model/init_functions.py); d is the hidden size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron.config.sections.model import ModelConfig
from megatron.mpu.parameters import Initializer
from megatron.registry import Registry

INIT_METHODS: Registry[Callable[[ModelConfig], Initializer]] = Registry("init method")


def input_initializer(model: ModelConfig) -> Initializer:
    """Returns the initializer of embeddings, head, key tokens, qkv and first MLP matrices (`init_method`)."""
    return INIT_METHODS[model.init_method](model)


def output_initializer(model: ModelConfig) -> Initializer:
    """Returns the initializer of value tokens, attention output and second MLP matrices.

    The key is `output_layer_init_method`.
    """
    return INIT_METHODS[model.output_layer_init_method](model)


def gaussian(std: float) -> Initializer:
    """Returns the initializer that draws from N(0, std^2)."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0.0, std, generator=generator)

    return fill


@INIT_METHODS.register("normal")
def normal(model: ModelConfig) -> Initializer:
    """Draws with standard deviation init_method_std."""
    return gaussian(model.init_method_std)


@INIT_METHODS.register("scaled_normal")
def scaled_normal(model: ModelConfig) -> Initializer:
    """Draws with standard deviation init_method_std / sqrt(2 L)."""
    return gaussian(model.init_method_std / math.sqrt(2.0 * model.num_layers))


@INIT_METHODS.register("small_init")
def small_init(model: ModelConfig) -> Initializer:
    """Draws with standard deviation sqrt(2 / (5 d)) (Nguyen and Salazar 2019, arXiv:1910.05895)."""
    return gaussian(math.sqrt(2.0 / (5.0 * model.hidden_size)))


@INIT_METHODS.register("wang_init")
def wang_init(model: ModelConfig) -> Initializer:
    """Draws with standard deviation 2 / (L sqrt(d))."""
    return gaussian(2.0 / model.num_layers / math.sqrt(model.hidden_size))


@INIT_METHODS.register("xavier_uniform")
def xavier_uniform(model: ModelConfig) -> Initializer:
    """Draws uniformly within sqrt(6 / (rows + columns)) of 0 (Glorot and Bengio 2010)."""
    return lambda tensor, generator: nn.init.xavier_uniform_(tensor, generator=generator)


@INIT_METHODS.register("xavier_normal")
def xavier_normal(model: ModelConfig) -> Initializer:
    """Draws with standard deviation sqrt(2 / (rows + columns)) (Glorot and Bengio 2010)."""
    return lambda tensor, generator: nn.init.xavier_normal_(tensor, generator=generator)


@INIT_METHODS.register("orthogonal")
def orthogonal(model: ModelConfig) -> Initializer:
    """Draws orthonormal rows or columns (Saxe et al. 2013), times sqrt(2)."""
    return _orthogonal(math.sqrt(2.0))


@INIT_METHODS.register("scaled_orthogonal")
def scaled_orthogonal(model: ModelConfig) -> Initializer:
    """Draws orthonormal rows or columns, times sqrt(2 / L)."""
    return _orthogonal(math.sqrt(2.0 / model.num_layers))


def _orthogonal(gain: float) -> Initializer:
    return lambda tensor, generator: nn.init.orthogonal_(tensor, gain, generator=generator)
