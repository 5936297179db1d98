"""Counts of parameter tokens that a share of a model has, and the smaller model that they make."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.config.sections.model import ModelConfig, ParamTokenConfig
from megatron.errors import ConfigError

TOKEN_KEYS = {"qkv": "qkv_slot_num", "proj": "proj_slot_num", "ffn": "ffn_slot_num"}
"""Counts of parameter tokens, by field of the model's section, and their YAML keys; each has a scale of its own,
such as `qkv_scale_base`."""

_ROUNDING = 1e-6
"""Share of a block by which a decimal fraction, such as 0.333333, may miss a whole number of tokens."""


def tokens_of_share(count: int, groups: int, share: float) -> int | None:
    """Returns how many of `count` tokens in `groups` equal blocks the share takes [tokens].

    None where that is not the same whole number of tokens, one at least, of every block.
    """
    if count % groups:
        return None
    block = count // groups
    taken = round(share * block)
    return groups * taken if taken and abs(share * block - taken) <= _ROUNDING * block else None


def nearest_share(count: int, groups: int, share: float) -> str:
    """Writes the nearest share that is a whole number of tokens of every block, and the tokens that it takes."""
    block = max(count // groups, 1)
    taken = min(max(round(share * block), 1), block)
    return f"{taken / block:.7g} ({taken * groups} tokens)"


def model_of_share(model: ModelConfig, share: float) -> ModelConfig:
    """Returns the model that reads a share of the parameter tokens of every Pattention, under the scale of the whole.

    Raises ConfigError for a model without parameter tokens, and for a share that is no whole number of tokens.
    """
    tokens = _tokens_of(model)
    counts = {}
    for field, key in TOKEN_KEYS.items():
        count = getattr(tokens, field)
        taken = tokens_of_share(count, tokens.groups, share)
        if taken is None:
            raise ConfigError(
                f"share {share:g}: takes no whole number of tokens of each of the {tokens.groups} groups of {key} "
                f"{count}. Nearest: {nearest_share(count, tokens.groups, share)}."
            )
        counts[field] = taken
    return model_of_counts(model, counts)


def model_of_counts(model: ModelConfig, counts: Mapping[str, int]) -> ModelConfig:
    """Returns the model with fewer parameter tokens, by field of its section, under the scale of the whole.

    Raises ConfigError for a model without parameter tokens, for more tokens than there are, and for counts that do not
    split evenly over the groups.
    """
    tokens = _tokens_of(model)
    for field, taken in counts.items():
        count, key = getattr(tokens, field), TOKEN_KEYS[field]
        if not 0 < taken <= count:
            raise ConfigError(f"{key}: {taken} tokens are asked for, and there are {count}. Ask for 1 to {count}.")
        if taken % tokens.groups:
            below = max(taken // tokens.groups, 1) * tokens.groups
            raise ConfigError(
                f"{key}: {taken} tokens do not split evenly over param_token_groups {tokens.groups}, of each of which "
                f"a part is taken. Nearest: {below}."
            )
    return model.model_copy(update={"param_tokens": tokens.model_copy(update=dict(counts))})


def _tokens_of(model: ModelConfig) -> ParamTokenConfig:
    if model.param_tokens is None:
        raise ConfigError(f"architecture: {model.architecture} has no parameter tokens of which a share could be read.")
    return model.param_tokens
