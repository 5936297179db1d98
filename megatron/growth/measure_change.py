"""Measures what a growth changes of a model's function, on tokens, before anything of it is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.checkpointing.states.fold_ramp import fold_ramp
from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.sections.model import ModelConfig
from megatron.errors import CheckpointError
from megatron.growth.growth_operator import GROWTH_OPERATORS, Growth, grown_layers
from megatron.growth.layer_reader import LayerReader
from megatron.model.causal_lm import VocabSize, layer_entries
from megatron.model.embedding import TokenEmbedding, tied_logits
from megatron.mpu.context import ParallelContext

TOLERANCE = 1e-5
"""Largest change of a logit that rounding explains, as a share of the largest logit; between float32 models."""


@dataclass(frozen=True)
class FunctionChange:
    """Difference between the smaller and the larger model on the same tokens."""

    logits: float
    """Largest difference of a logit, as a share of the largest logit before."""
    loss_before: float
    """Mean cross entropy of the next token [nat]."""
    loss_after: float


def measure_change(source: Checkpoint, growth: Growth, tokens_BS: Tensor) -> FunctionChange:
    """Computes logits and loss of both models in float32, from the optimizer's weights where there are any.

    Weights alone are computed with before they are rounded to their format again. A layer of either model is in memory
    at a time. A multiplier that opens is the number that it is at first.
    """
    reader = LayerReader(source)
    layers = (in_float32(reader.read(name)) for name in reader.names)
    before_BSV = logits_of_layers(growth.before, growth.vocab, layers, tokens_BS)
    grown = grown_layers(lambda name: in_float32(reader.read(name)), growth)
    state = replace(source.state, growth=(growth.record,))
    after_BSV = logits_of_layers(growth.after, growth.vocab, (fold_ramp(layer, state) for layer in grown), tokens_BS)
    rows = growth.vocab.actual if growth.before.mask_padded_vocab else growth.vocab.padded
    loss_before, loss_after = (next_token_loss(logits[..., :rows], tokens_BS) for logits in (before_BSV, after_BSV))
    largest = before_BSV.abs().max()
    return FunctionChange(float((after_BSV - before_BSV).abs().max() / largest), loss_before, loss_after)


def require_promised(change: FunctionChange, growth: Growth) -> None:
    """Raises CheckpointError when an operator that promises to preserve the function has changed it."""
    tokens = growth.before.param_tokens
    operator = GROWTH_OPERATORS[growth.rules.operator]
    if operator.is_exact(None if tokens is None else tokens.theta) and not change.logits <= TOLERANCE:
        raise CheckpointError(
            f"{growth.rules.operator} preserves the function, but logits changed by {change.logits:.1e} of the "
            f"largest; at most {TOLERANCE:.0e} is rounding. Nothing was written. The operator is wrong, or the "
            "checkpoint's weights are not finite."
        )


def in_float32(layer: LayerState) -> LayerState:
    """Returns a layer's weights alone, the optimizer's where it has them, in float32 at least."""

    def weight(state: ParameterState) -> Tensor:
        exact = state.weight if state.master is None else state.master
        return exact.to(torch.promote_types(exact.dtype, torch.float32))

    return layer.replace({name: ParameterState(weight(state)) for name, state in layer.parameters.items()})


@torch.no_grad()
def logits_of_layers(model: ModelConfig, vocab: VocabSize, layers: Iterable[LayerState], tokens_BS: Tensor) -> Tensor:
    """Computes logits [B, S, V] from layers in the order of the pipeline."""
    entries = {entry.name: entry for entry in reversed(layer_entries(model, vocab, ParallelContext.single()))}
    x = tokens_BS
    embedding: TokenEmbedding | None = None
    for layer in layers:
        with torch.device("meta"):
            module = entries[layer.name].build().eval()
        weights = {name: state.weight for name, state in layer.parameters.items()}
        module.load_state_dict(weights, strict=True, assign=True)
        x = module(x)
        if isinstance(module, TokenEmbedding):
            embedding = module
    return tied_logits(embedding, x) if embedding is not None and model.tie_embeddings else x


def next_token_loss(logits_BSV: Tensor, tokens_BS: Tensor) -> float:
    """Returns the mean cross entropy of the next token [nat]."""
    return float(F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten()))
