"""Rotary positions: every backend against products of complex numbers, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.kernels.rotary.backends.reference import rotate_reference
from megatron.kernels.rotary.rotary import ROTARY
from megatron.model.positions import RotaryEmbedding
from tests.helpers.kernel_backends import assert_near, fast_backends, load_backend, outputs_and_gradients, seeded
from tests.helpers.models import tiny_tokenformer


def tables(batch: int, length: int, rotated: int) -> tuple[Tensor, Tensor]:
    positions = torch.arange(length) if batch == 1 else torch.arange(batch * length).view(batch, length) * 3
    model = tiny_tokenformer(hidden_size=4 * rotated, num_attention_heads=4, rotary_pct=1.0)
    return RotaryEmbedding(model).tables(positions.view(batch, length))


@pytest.mark.parametrize(
    ("heads", "key_heads", "features", "rotated"), [(4, 4, 64, 16), (3, 1, 10, 10), (1, 1, 6, 2), (6, 2, 16, 16)]
)
@pytest.mark.parametrize("several_tables", [False, True])
@pytest.mark.parametrize("name", fast_backends(ROTARY))
def test_backend_computes_the_definition(
    name: str, several_tables: bool, heads: int, key_heads: int, features: int, rotated: int
) -> None:
    """Queries as parts of a larger tensor, as fused projections give them; keys contiguous, and of fewer heads."""
    backend = load_backend(ROTARY, name)
    of_queries, of_keys = (2, 5, heads, features), (2, 5, key_heads, features)
    drawn = seeded((2, 5, heads, 3, features), of_keys, of_queries, of_keys)
    q3, k, probe_q, probe_k = backend.prepared(drawn)
    cos, sin = (table.to(backend.device) for table in tables(2 if several_tables else 1, 5, rotated))

    def joined(rotated_pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat(rotated_pair, dim=2)

    probe = joined((probe_q, probe_k))
    got = outputs_and_gradients(
        lambda leaves: joined(backend.function(leaves[0][..., 1, :], leaves[1], cos, sin)), [q3, k], probe
    )
    wide = [tensor.cpu().double() for tensor in (q3, k, probe, cos, sin)]
    want = outputs_and_gradients(
        lambda leaves: joined(tuple(rotate_reference(x, *wide[3:]) for x in (leaves[0][..., 1, :], leaves[1]))),
        wide[:2],
        wide[2],
    )
    assert_near(got, want, backend.tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", fast_backends(ROTARY))
def test_half_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    """Each output is within half a unit in the last place of float64's, but for the float32 arithmetic before it."""
    backend = load_backend(ROTARY, name)
    q, k = (x.to(backend.device) for x in seeded((2, 5, 3, 16), (2, 5, 3, 16), dtype=dtype))
    cos, sin = (table.to(backend.device) for table in tables(1, 5, 8))
    for got, x in zip(backend.function(q, k, cos, sin), (q, k), strict=True):
        want = rotate_reference(x.cpu().double(), cos.cpu().double(), sin.cpu().double())
        assert got.dtype == dtype
        error = (got.cpu().double() - want).abs()
        assert (error <= want.abs() * torch.finfo(dtype).eps * 0.5 + 3e-7).all()


@pytest.mark.parametrize("name", fast_backends(ROTARY))
def test_rotations_keep_lengths_and_compose(name: str) -> None:
    """A rotation has no effect on a pair's length; backwards it undoes itself: closed forms, without a reference."""
    backend = load_backend(ROTARY, name)
    q, k = backend.prepared(seeded((1, 4, 2, 8), (1, 4, 2, 8)))
    cos, sin = (table.to(backend.device, backend.dtype) for table in tables(1, 4, 8))
    turned, _ = backend.function(q, k, cos, sin)
    pairs = [x.unflatten(-1, (2, 4)).square().sum(-2) for x in (turned, q)]
    torch.testing.assert_close(*pairs, rtol=1e-6, atol=1e-6)
    back, _ = backend.function(turned, k, cos, -sin)
    torch.testing.assert_close(back, q, rtol=1e-6, atol=1e-6)
