"""Pattention: the definition against the published implementation's numbers, the fast path against the definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron.kernels.pattention.op import pattention
from megatron.kernels.pattention.reference import WEIGHTS, pattention_reference
from megatron.kernels.pattention.theta import THETAS, RowReduction

VECTORS = np.load(Path(__file__).parent / "pattention.npz", allow_pickle=False)
ALL_THETAS = ["softmax", "gelu_l2_norm", "l2_norm_gelu"]
Single = Callable[[Tensor, Tensor, Tensor, str, int], Tensor]


def fast_single(x: Tensor, key: Tensor, value: Tensor, theta: str, scale_base: int) -> Tensor:
    return pattention(x, [key], [value], theta=theta, scale_base=scale_base, rows=RowReduction())[0]


def outputs_and_gradients(
    function: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Tensor], probe: Tensor
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(leaves)
    y.backward(probe)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def seeded(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("theta", ALL_THETAS)
@pytest.mark.parametrize("rows", [1, 7])
def test_without_gradients_the_outputs_are_the_same(theta: str, rows: int) -> None:
    x, *tokens = seeded((2, rows, 6), *[(5, 6)] * 3, *[(5, 4)] * 3)
    options = {"theta": theta, "scale_base": 3, "rows": RowReduction()}
    got = []
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got.append(pattention(x, tokens[:3], tokens[3:], **options))
    want = torch.stack([pattention_reference(x, k, v, theta, 3) for k, v in zip(tokens[:3], tokens[3:], strict=True)])
    for y in got:
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y, pattention(x, tokens[:3], tokens[3:], **options), rtol=1e-12, atol=1e-12)


def test_reference_and_fast_path_know_the_same_thetas() -> None:
    assert set(THETAS) == set(WEIGHTS) == set(ALL_THETAS)


@pytest.mark.parametrize("theta", ALL_THETAS)
@pytest.mark.parametrize(("precision", "tolerance"), [("f64", 1e-12), ("f32", 2e-5)])
@pytest.mark.parametrize("implementation", [pattention_reference, fast_single])
def test_agrees_with_the_published_numbers(
    theta: str, precision: str, tolerance: float, implementation: Single
) -> None:
    """Errors relative to a tensor's largest element: in float32 the published softmax gradients, which cancel, are
    themselves off by 8e-5 where the largest element is 118."""

    def vector(name: str) -> Tensor:
        return torch.from_numpy(VECTORS[f"{theta}.{precision}.{name}"])

    got = outputs_and_gradients(
        lambda leaves: implementation(*leaves, theta, leaves[1].shape[0]),
        [vector("input"), vector("key"), vector("value")],
        vector("probe"),
    )
    want = [vector(name) for name in ("output", "grad_input", "grad_key", "grad_value")]
    for g, w in zip(got, want, strict=True):
        assert float((g - w).abs().max() / w.abs().max()) <= tolerance
        if precision == "f64":
            torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("theta", ALL_THETAS)
@pytest.mark.parametrize("num", [1, 3])
def test_fast_path_equals_the_definition_also_with_a_pinned_scale(theta: str, num: int) -> None:
    x, probe = seeded((2, 5, 8), (num, 2, 5, 6))
    tokens = [*seeded(*[(12, 8)] * num), *seeded(*[(12, 6)] * num)]

    def definition(leaves: Sequence[Tensor]) -> Tensor:
        keys, values = leaves[1 : 1 + num], leaves[1 + num :]
        pairs = zip(keys, values, strict=True)
        return torch.stack([pattention_reference(leaves[0], k, v, theta, 5) for k, v in pairs])

    def fast(leaves: Sequence[Tensor]) -> Tensor:
        keys, values = leaves[1 : 1 + num], leaves[1 + num :]
        return pattention(leaves[0], keys, values, theta=theta, scale_base=5, rows=RowReduction())

    want = outputs_and_gradients(definition, [x, *tokens], probe)
    got = outputs_and_gradients(fast, [x, *tokens], probe)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("theta", ALL_THETAS)
def test_gradcheck(theta: str) -> None:
    inputs = [t.requires_grad_() for t in seeded((3, 4), (6, 4), (6, 4), (6, 5), (6, 5))]

    def function(x: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
        return pattention(x, [k1, k2], [v1, v2], theta=theta, scale_base=4, rows=RowReduction())

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("theta", ALL_THETAS)
def test_rows_split_in_two_complete_each_other(theta: str) -> None:
    """Two halves of the tokens, each told the other's statistic, sum to the whole: forward and backward."""
    x, key, value, probe = seeded((7, 8), (12, 8), (12, 6), (7, 6))
    want = outputs_and_gradients(lambda leaves: pattention_reference(*leaves, theta, 12), [x, key, value], probe)
    got_y, got_dx = torch.zeros_like(want[0]), torch.zeros_like(want[1])
    for half in (slice(0, 6), slice(6, 12)):
        calls = list(_statistics_of_other_half(x, key, value, probe, theta=theta, half=half))
        rows = RowReduction(
            sum=lambda t, calls=calls: t + calls.pop(0), max=lambda t, calls=calls: t.maximum(calls.pop(0))
        )
        y, dx, dk, dv = outputs_and_gradients(
            lambda leaves, rows=rows: pattention(
                leaves[0], [leaves[1]], [leaves[2]], theta=theta, scale_base=12, rows=rows
            )[0],
            [x, key[half], value[half]],
            probe,
        )
        assert not calls
        got_y += y
        got_dx += dx
        torch.testing.assert_close(dk, want[2][half], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dv, want[3][half], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_y, want[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_dx, want[1], rtol=1e-12, atol=1e-12)


def _statistics_of_other_half(
    x: Tensor, key: Tensor, value: Tensor, probe: Tensor, *, theta: str, half: slice
) -> list[Tensor]:
    """What the other rank contributes to each row reduction, in the order of the calls, from whole tensors."""
    other = torch.ones(12, dtype=torch.bool)
    other[half] = False
    scores = (x @ key.T).requires_grad_()
    h = WEIGHTS[theta](scores, 12)
    g = probe @ value.T
    if theta == "l2_norm_gelu":
        u = scores * (12**0.5 / scores.square().sum(-1, keepdim=True).sqrt())
        u_leaf = u.detach().requires_grad_()
        (p,) = torch.autograd.grad(torch.nn.functional.gelu(u_leaf), u_leaf, g)
        forward, products = [scores.square()], p * u
    elif theta == "gelu_l2_norm":
        forward, products = [torch.nn.functional.gelu(scores).square()], g * h
    else:
        forward, products = [(scores - scores.amax(-1, keepdim=True)).exp()], g * h
    sums = [t[:, other].sum(-1, keepdim=True).detach().unsqueeze(1) for t in [*forward, products]]
    if theta == "softmax":
        return [scores[:, other].amax(-1, keepdim=True).detach().unsqueeze(1), *sums]
    return sums


@pytest.mark.parametrize("theta", ALL_THETAS)
@pytest.mark.parametrize("implementation", [pattention_reference, fast_single])
@pytest.mark.parametrize("tiny", [0.0, 1e-30])
def test_a_row_that_vanishes_gives_zero_and_no_gradient(theta: str, implementation: Single, tiny: float) -> None:
    """The published code gives NaN (zero_input in the vectors); softmax of zeros is uniform."""
    key = torch.from_numpy(VECTORS[f"{theta}.zero_input.key"])
    value = torch.from_numpy(VECTORS[f"{theta}.zero_input.value"])
    x = torch.full((2, 1, key.shape[1]), tiny)
    x[1] = 1.0
    y, *gradients = outputs_and_gradients(
        lambda leaves: implementation(*leaves, theta, key.shape[0]), [x, key, value], torch.ones(2, 1, value.shape[1])
    )
    want = value.sum(0) if theta == "softmax" else torch.zeros(value.shape[1])
    torch.testing.assert_close(y[0, 0], want, rtol=2e-5, atol=2e-5)
    assert all(gradient.isfinite().all() for gradient in gradients)
    if theta != "softmax":
        assert (gradients[0][0] == 0).all()
        assert (gradients[0][1] != 0).any()


@pytest.mark.parametrize("theta", ALL_THETAS)
@pytest.mark.parametrize("implementation", [pattention_reference, fast_single])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_ten_thousand_stay_finite_in_half_precision(
    theta: str, implementation: Single, dtype: torch.dtype
) -> None:
    x, key, value, probe = seeded((4, 16), (32, 16), (32, 8), (4, 8), dtype=dtype)
    x = x * (1e4 / float((x.float() @ key.float().T).abs().max()))
    assert float((x.float() @ key.float().T).abs().max()) > 9e3
    x[2] = 0
    results = outputs_and_gradients(lambda leaves: implementation(*leaves, theta, 32), [x, key, value], probe)
    assert all(result.dtype == dtype and result.isfinite().all() for result in results)
    assert results[0].abs().max() > 0


@pytest.mark.parametrize("theta", ALL_THETAS)
def test_bfloat16_differs_from_float64_by_rounding_only(theta: str) -> None:
    inputs = seeded((64, 32), (48, 32), (48, 24), (64, 24), dtype=torch.bfloat16)
    want = outputs_and_gradients(
        lambda leaves: pattention_reference(*leaves, theta, 48), [t.double() for t in inputs[:3]], inputs[3].double()
    )
    got = outputs_and_gradients(lambda leaves: fast_single(*leaves, theta, 48), inputs[:3], inputs[3])
    for g, w in zip(got, want, strict=True):
        assert float((g.double() - w).norm() / w.norm()) < 0.02


@pytest.mark.parametrize("theta", ALL_THETAS)
def test_saves_inputs_scores_and_statistics_but_no_weights(theta: str) -> None:
    x, key, value = (t.requires_grad_() for t in seeded((10, 8), (16, 8), (16, 8), dtype=torch.float32))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fast_single(x, key, value, theta, 16)
    activations = sorted(t.numel() for t in saved if t.data_ptr() not in {key.data_ptr(), value.data_ptr()})
    assert activations == [10 * (2 if theta == "softmax" else 1), 10 * 8, 10 * 16]


@pytest.mark.parametrize("theta", ALL_THETAS)
def test_recomputation_and_no_grad_change_nothing(theta: str) -> None:
    x, key, value, probe = seeded((5, 8), (16, 8), (16, 6), (5, 6))
    want = outputs_and_gradients(lambda leaves: fast_single(*leaves, theta, 16), [x, key, value], probe)
    got = outputs_and_gradients(
        lambda leaves: checkpoint(fast_single, *leaves, theta, 16, use_reentrant=False), [x, key, value], probe
    )
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    with torch.no_grad():
        y = fast_single(x, key.requires_grad_(), value, theta, 16)
    assert not y.requires_grad
    assert torch.equal(y, want[0])


def test_without_an_input_gradient_the_tokens_still_get_theirs() -> None:
    x, key, value, probe = seeded((5, 8), (16, 8), (16, 6), (5, 6))
    key.requires_grad_()
    fast_single(x, key, value, "l2_norm_gelu", 16).backward(probe)
    assert key.grad is not None
    assert x.grad is None
