"""Causal attention: every backend against the definition, the definition against hand-made cases."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megatron.kernels.attention.backends.reference import causal_attention_reference
from megatron.kernels.attention.causal_attention import CAUSAL_ATTENTION, cached_attention
from tests.helpers.kernel_backends import assert_near, fast_backends, load_backend, outputs_and_gradients, seeded

SHAPE = (2, 7, 3, 8)


@pytest.mark.parametrize("name", fast_backends(CAUSAL_ATTENTION))
def test_backend_computes_the_definition(name: str) -> None:
    backend = load_backend(CAUSAL_ATTENTION, name)
    *qkv, probe = backend.prepared(seeded(*[SHAPE] * 4))
    got = outputs_and_gradients(lambda leaves: backend.function(*leaves, 0.0), qkv, probe)
    *wide, wide_probe = [tensor.cpu().double() for tensor in (*qkv, probe)]
    want = outputs_and_gradients(lambda leaves: causal_attention_reference(*leaves)[0], wide, wide_probe)
    assert_near(got, want, backend.tolerance)


GROUPED = [(2, 7, 6, 8), (2, 7, 2, 8), (2, 7, 2, 8), (2, 7, 6, 8)]
"""Queries, keys, values and the probe of the output: three query heads to each head of keys and values."""


@pytest.mark.parametrize("name", fast_backends(CAUSAL_ATTENTION))
def test_backend_shares_keys_and_values_among_neighbouring_heads(name: str) -> None:
    backend = load_backend(CAUSAL_ATTENTION, name)
    *qkv, probe = backend.prepared(seeded(*GROUPED))
    got = outputs_and_gradients(lambda leaves: backend.function(*leaves, 0.0), qkv, probe)
    *wide, wide_probe = [tensor.cpu().double() for tensor in (*qkv, probe)]
    assert_near(got, outputs_and_gradients(head_by_head, wide, wide_probe), backend.tolerance)


def test_the_definition_shares_them_as_well_and_cached_ones() -> None:
    q, k, v, _ = seeded(*GROUPED)
    want = head_by_head((q, k, v))
    torch.testing.assert_close(causal_attention_reference(q, k, v)[0], want, rtol=1e-12, atol=1e-12)
    cached = [x.transpose(1, 2) for x in (k, v)]
    torch.testing.assert_close(cached_attention(q[:, -1:], *cached, None), want[:, -1:], rtol=1e-12, atol=1e-12)


def head_by_head(qkv: Sequence[Tensor]) -> Tensor:
    """Each query head by itself, with the keys and values of its group."""
    q, k, v = qkv
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    outputs = []
    for head in range(6):
        scores = q[:, :, head] @ k[:, :, head // 3].transpose(1, 2) / 8**0.5
        outputs.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v[:, :, head // 3])
    return torch.stack(outputs, dim=2)


@pytest.mark.parametrize("name", list(CAUSAL_ATTENTION))
def test_a_scale_takes_the_place_of_the_usual_one(name: str) -> None:
    """Scores times 1 / (3 sqrt(E)), as of the third layer: those of queries over three, spelled out head by head."""
    backend = load_backend(CAUSAL_ATTENTION, name)
    *qkv, probe = backend.prepared(seeded(*GROUPED))
    got = outputs_and_gradients(lambda leaves: backend.function(*leaves, 0.0, 8**-0.5 / 3), qkv, probe)
    *wide, wide_probe = [tensor.cpu().double() for tensor in (*qkv, probe)]
    want = outputs_and_gradients(lambda leaves: head_by_head((leaves[0] / 3, *leaves[1:])), wide, wide_probe)
    assert_near(got, want, backend.tolerance)
    cached = [x.transpose(1, 2) for x in wide[1:]]
    last = cached_attention(wide[0][:, -1:], *cached, None, 8**-0.5 / 3)
    torch.testing.assert_close(last, want[0][:, -1:].double(), rtol=1e-12, atol=1e-12)


def test_probabilities_are_causal_and_normalized() -> None:
    _, probabilities = causal_attention_reference(*seeded(*[SHAPE] * 3, dtype=torch.bfloat16))
    assert probabilities.dtype == torch.float32
    assert probabilities.shape == (2, 3, 7, 7)
    assert (probabilities.triu(1) == 0).all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3, 7))


def test_equal_scores_average_the_past() -> None:
    q, k, v = seeded(*[SHAPE] * 3)
    out, _ = causal_attention_reference(torch.zeros_like(q), k, v)
    counts = torch.arange(1, 8, dtype=v.dtype).view(1, -1, 1, 1)
    torch.testing.assert_close(out, v.cumsum(1) / counts, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(CAUSAL_ATTENTION))
def test_dropout_drops(name: str) -> None:
    backend = load_backend(CAUSAL_ATTENTION, name)
    torch.manual_seed(0)
    qkv = backend.prepared(seeded(*[SHAPE] * 3))
    plain = backend.function(*qkv, 0.0)
    assert not torch.equal(backend.function(*qkv, 0.5), backend.function(*qkv, 0.5))
    assert torch.equal(backend.function(*qkv, 0.0), plain)
    mean = torch.stack([backend.function(*qkv, 0.5).double() for _ in range(2000)]).mean(0)
    assert float((mean - plain).abs().max()) < 0.2  # three standard deviations of the mean


def test_new_queries_over_cached_keys_are_the_last_rows() -> None:
    q, k, v = seeded(*[SHAPE] * 3)
    want = causal_attention_reference(q, k, v)[0]
    cached = [x.transpose(1, 2) for x in (k, v)]
    got = cached_attention(q[:, -1:], *cached, None)
    torch.testing.assert_close(got, want[:, -1:], rtol=1e-12, atol=1e-12)
    mask = torch.ones(3, 7, dtype=torch.bool).tril(4).view(1, 1, 3, 7)
    torch.testing.assert_close(cached_attention(q[:, -3:], *cached, mask), want[:, -3:], rtol=1e-12, atol=1e-12)
