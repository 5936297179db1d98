"""Causal attention: the fused kernel against the definition, the definition against hand-made cases."""

from __future__ import annotations

import torch

from megatron.kernels.attention.op import cached_attention, causal_attention
from megatron.kernels.attention.reference import causal_attention_reference


def random_qkv(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 7, 3, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def test_fused_equals_reference_in_outputs_and_gradients() -> None:
    results = []
    for function in (causal_attention, lambda *qkv: causal_attention_reference(*qkv)[0]):
        leaves = [t.requires_grad_() for t in random_qkv()]
        out = function(*leaves)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_probabilities_are_causal_and_normalized() -> None:
    _, probabilities = causal_attention_reference(*random_qkv(torch.bfloat16))
    assert probabilities.dtype == torch.float32
    assert probabilities.shape == (2, 3, 7, 7)
    assert (probabilities.triu(1) == 0).all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3, 7))


def test_equal_scores_average_the_past() -> None:
    q, k, v = random_qkv()
    out, _ = causal_attention_reference(torch.zeros_like(q), k, v)
    counts = torch.arange(1, 8, dtype=v.dtype).view(1, -1, 1, 1)
    torch.testing.assert_close(out, v.cumsum(1) / counts, rtol=1e-12, atol=1e-12)


def test_dropout_drops() -> None:
    torch.manual_seed(0)
    q, k, v = random_qkv(torch.float32)
    assert not torch.equal(causal_attention(q, k, v, dropout=0.5), causal_attention(q, k, v, dropout=0.5))
    assert torch.equal(causal_attention(q, k, v), causal_attention(q, k, v))


def test_new_queries_over_cached_keys_are_the_last_rows() -> None:
    q, k, v = random_qkv()
    want = causal_attention_reference(q, k, v)[0]
    cached = [x.transpose(1, 2) for x in (k, v)]
    got = cached_attention(q[:, -1:], *cached, None)
    torch.testing.assert_close(got, want[:, -1:], rtol=1e-12, atol=1e-12)
    mask = torch.ones(3, 7, dtype=torch.bool).tril(4).view(1, 1, 3, 7)
    torch.testing.assert_close(cached_attention(q[:, -3:], *cached, mask), want[:, -3:], rtol=1e-12, atol=1e-12)
