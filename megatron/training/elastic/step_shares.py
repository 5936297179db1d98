"""Shares of the parameter tokens that each step reads, and what the step costs by them."""

from __future__ import annotations

import torch

from megatron.config.architectures.tokenformer import param_tokens
from megatron.config.sections.elastic import ElasticConfig
from megatron.config.sections.model import ModelConfig
from megatron.config.token_share import tokens_of_share
from megatron.model.token_shares import SUBLAYERS, Shares, sublayer_names
from megatron.mpu.parameters import named_generator

WHOLE: Shares = {}
"""Of a pass that reads all tokens."""


def step_shares(config: ElasticConfig, model: ModelConfig, seed: int, iteration: int) -> list[Shares]:
    """Returns the shares that the step after `iteration` steps reads, for each pass over its micro batches.

    Seed and step decide them, so that ranks, pipeline stages and a run that resumes read the same.
    """
    if config.full_model == "alternate" and iteration % 2 == 0:
        return [WHOLE]
    names, choices = sublayer_names(model), config.drawn
    draws = len(names) if config.sample == "sublayer" else 1
    chosen = torch.randint(len(choices), (draws,), generator=named_generator(seed, f"elastic step {iteration}"))
    shares = [choices[index] for index in chosen.tolist()] * (len(names) // draws)
    drawn = dict(zip(names, shares, strict=True))
    return [WHOLE, drawn] if config.full_model == "always" else [drawn]


def saved_flops(model: ModelConfig, shares: Shares) -> int:
    """Counts what a pass with these shares saves of one of the whole model, forward and backward [FLOP per token].

    The convention is that of megatron/config/model_size.py: two for each weight forward, four backward.
    """
    tokens = param_tokens(model)
    unread = 0
    for field, local in SUBLAYERS.items():
        count, projections = getattr(tokens, field), 3 if field == "qkv" else 1
        for layer in range(model.num_layers):
            read = tokens_of_share(count, tokens.groups, shares.get(f"layers.{layer}.{local}", 1.0))
            unread += projections * (count - (read or count))
    return 6 * 2 * model.hidden_size * unread


def mean_saved_flops(config: ElasticConfig, model: ModelConfig) -> float:
    """Counts what a pass with drawn shares saves of one of the whole model on average [FLOP per token]."""
    names = sublayer_names(model)
    return sum(saved_flops(model, dict.fromkeys(names, share)) for share in config.drawn) / len(config.drawn)
