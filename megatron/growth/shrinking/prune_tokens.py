"""Orders the parameter tokens of a trained model by their importance on real text, so that the least can be dropped.

Two measures of a token's importance, each a mean over positions or sequences:

    activation   |weight| ||value||: what it adds to the output of its Pattention
    gradient     |sum over its key and its value of gradient times weight|: what the loss would change by without it, to
                 first order (Molchanov et al. 2019, arXiv:1906.10771)

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.checkpointing.states.layer_state import LayerState
from megatron.checkpointing.states.token_rows import in_groups, with_rows, with_tokens_of
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.architectures.tokenformer import param_tokens
from megatron.config.sections.model import ModelConfig
from megatron.growth.shrinking.write_smaller import Shrinking, unchanged
from megatron.kernels.pattention.theta import THETAS, RowReduction
from megatron.model.causal_lm import LocalCausalLM, build_local
from megatron.model.pattention import Pattention

Measure = Literal["activation", "gradient"]
Importance = Mapping[str, Tensor]
"""Importance of the tokens [P] of each Pattention, by its name in the whole model, such as layers.3.attention.query."""


def token_importance(source: Checkpoint, measure: Measure, sequences: Sequence[Tensor]) -> Importance:
    """Measures every token of a checkpoint's model on batches of tokens [B, S], in float32 on the CPU.

    The whole model is in memory; `gradient` needs its gradients too.
    """
    model = build_local(source.config.model, source.vocab, seed=None)
    layers = unchanged(source).layers(exact=True)
    model.load_state_dict({name: weight for layer in layers for name, weight in layer.weights().items()})
    model.eval()
    by_measure: dict[str, Callable[[LocalCausalLM, Tensor], Importance]] = {
        "activation": _by_activation,
        "gradient": partial(_by_gradient, num_valid=source.vocab.num_valid(source.config.model)),
    }
    total: dict[str, Tensor] = {}
    for tokens_BS in sequences:
        for name, importance_P in by_measure[measure](model, tokens_BS).items():
            total[name] = total.get(name, 0.0) + importance_P / len(sequences)
    return total


def by_importance(source: Checkpoint, importance: Importance, smaller: ModelConfig) -> Shrinking:
    """Returns what keeps the most important tokens of each Pattention, as many as `smaller` has, the first the best.

    They lie in the model's groups so that every share of them is the most important part. With all tokens kept the
    function stays the same, for Theta does not depend on their order; masters and moments move with their rows.
    """
    whole = source.config.model
    one_group = _grouped(whole, 1)

    def change(layer: LayerState) -> LayerState:
        def ranked(local: str, field: str) -> Tensor:
            name = f"{layer.name}.{local}".rpartition(".")[0]
            return importance[name].argsort(descending=True, stable=True)

        best = with_tokens_of(with_rows(layer, ranked), one_group, smaller)
        return in_groups(best, _grouped(smaller, 1), param_tokens(smaller).groups)

    return Shrinking(source, smaller, change)


def with_recomputed_scale(model: ModelConfig) -> ModelConfig:
    """Returns the model with the scale that its own counts give, which the published rule would recompute."""
    tokens = param_tokens(model)
    scales = {f"{field}_scale_base": getattr(tokens, field) for field in ("qkv", "proj", "ffn")}
    return model.model_copy(update={"param_tokens": tokens.model_copy(update=scales)})


def _grouped(model: ModelConfig, groups: int) -> ModelConfig:
    return model.model_copy(update={"param_tokens": param_tokens(model).model_copy(update={"groups": groups})})


def _by_activation(model: LocalCausalLM, tokens_BS: Tensor) -> Importance:
    """Computes the mean of |weight| ||value|| over positions."""
    found: dict[str, Tensor] = {}
    names = {layer.key_tokens: name for name, layer in _pattentions(model)}

    def measuring(
        x_BSD: Tensor,
        key_tokens: Sequence[Tensor],
        value_tokens: Sequence[Tensor],
        *,
        theta: str,
        scale_base: int,
        rows: RowReduction,
        recompute_scores: bool = False,
    ) -> Tensor:
        outputs = []
        for keys, values in zip(key_tokens, value_tokens, strict=True):
            weights_BSP = THETAS[theta].definition(x_BSD @ keys.T, scale_base)
            found[names[keys]] = weights_BSP.abs().mean((0, 1)) * torch.linalg.vector_norm(values, dim=-1)  # type: ignore[index]
            outputs.append(weights_BSP @ values)
        return torch.stack(outputs)

    for _, layer in _pattentions(model):
        layer.kernel = measuring
    with torch.no_grad():
        model(tokens_BS)
    return found


def _by_gradient(model: LocalCausalLM, tokens_BS: Tensor, num_valid: int | None) -> Importance:
    """Computes the mean over sequences of |sum of gradient times weight| of each token's key and value.

    `num_valid` rows of the vocabulary are in the softmax; None for all.
    """
    found: dict[str, Tensor] = {}
    for sequence_S in tokens_BS:
        model.zero_grad()
        logits_1SV = model(sequence_S.unsqueeze(0))
        torch.autograd.backward(F.cross_entropy(logits_1SV[0, :-1, :num_valid], sequence_S[1:]))
        for name, layer in _pattentions(model):
            change_P = torch.zeros(len(layer.key_tokens))
            for tokens in (layer.key_tokens, layer.value_tokens):
                if tokens.grad is not None:
                    change_P += (tokens.grad * tokens.detach()).sum(-1)
            found[name] = found.get(name, 0.0) + change_P.abs() / len(tokens_BS)
    return found


def _pattentions(model: LocalCausalLM) -> Iterator[tuple[str, Pattention]]:
    for name, module in model.named_modules():
        if isinstance(module, Pattention):
            yield name, module
