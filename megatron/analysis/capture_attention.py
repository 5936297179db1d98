"""Captures the attention probabilities of a model while it computes what it computes without.

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from megatron.kernels.attention.backends.reference import causal_attention_reference
from megatron.kernels.attention.causal_attention import CausalAttention
from megatron.model.attention import SelfAttention
from megatron.model.causal_lm import LocalCausalLM

Consumer = Callable[[int, Tensor], None]
"""(layer, probabilities [B, H, S, S]) -> nothing; what it does not keep is freed before the next layer computes."""


@contextmanager
def captured_attention(model: LocalCausalLM, consume: Consumer) -> Iterator[None]:
    """Hands `consume` the probabilities of every layer of each forward pass of the body, a layer at a time.

    They are the reference backend's, of the queries and keys that the layer's own backend is given. That one computes
    the output, so that logits stay as they are, bit for bit.
    """
    attentions = [module for module in model.modules() if isinstance(module, SelfAttention)]
    before = [attention.core_attention for attention in attentions]
    try:
        for index, attention in enumerate(attentions):
            attention.core_attention = _observed(attention.core_attention, index, consume)
        yield
    finally:
        for attention, backend in zip(attentions, before, strict=True):
            attention.core_attention = backend


def _observed(backend: CausalAttention, layer: int, consume: Consumer) -> CausalAttention:
    def causal_attention(*arguments: Any, **options: Any) -> Tensor:
        consume(layer, causal_attention_reference(*arguments, **options)[1])
        return backend(*arguments, **options)

    return causal_attention
