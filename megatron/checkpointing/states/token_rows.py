"""Takes parameter tokens out of a layer, or orders them anew: their rows of weights, masters and moments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron.checkpointing.states.layer_state import LayerState
from megatron.config.architectures.tokenformer import param_tokens
from megatron.config.sections.model import ModelConfig
from megatron.model.new_rows import token_field


def with_tokens_of(layer: LayerState, before: ModelConfig, after: ModelConfig) -> LayerState:
    """Returns a layer of `before` with as many parameter tokens as `after` has: the first ones of each group.

    Their rows are those of the layer, bitwise and in its order. Other parameters come along as they are.
    """
    tokens, smaller = param_tokens(before), param_tokens(after)

    def rows(field: str) -> Tensor:
        groups = tokens.groups
        by_group = torch.arange(getattr(tokens, field)).view(groups, -1)
        return by_group[:, : getattr(smaller, field) // groups].flatten()

    return with_rows(layer, lambda local, field: rows(field))


def in_groups(layer: LayerState, before: ModelConfig, groups: int) -> LayerState:
    """Returns a layer of `before` with its tokens in another number of groups, so that every share keeps its tokens.

    A share is m tokens of each group in either form. Those that both forms have are the same tokens. The layer computes
    what it did, since Theta does not depend on the order of tokens.
    """
    tokens = param_tokens(before)

    def rows(field: str) -> Tensor:
        by_rank = torch.arange(getattr(tokens, field)).view(tokens.groups, -1).T.flatten()
        return by_rank.view(-1, groups).T.flatten()

    return layer if groups == tokens.groups else with_rows(layer, lambda local, field: rows(field))


def with_rows(layer: LayerState, rows_of: Callable[[str, str], Tensor]) -> LayerState:
    """Returns a layer with the rows of its parameter tokens that `rows_of(local name, count's field)` lists.

    Key and value of a token are given the same row by whoever lists them.
    """
    changed = {}
    for local, state in layer.parameters.items():
        field = token_field(local)
        if field is not None:
            rows = rows_of(local, field)
            changed[local] = state.map(lambda tensor, rows=rows: tensor[rows])  # type: ignore[misc]
    return layer.replace(changed)
