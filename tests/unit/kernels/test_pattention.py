"""Pattention: the definition against the published implementation's numbers, every backend against the definition.

All of it for every registered Theta: a new one needs no test of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron.kernels.pattention.backends.reference import pattention_reference
from megatron.kernels.pattention.pattention import PATTENTION
from megatron.kernels.pattention.theta import THETAS, RowReduction
from tests.helpers.kernel_backends import (
    all_backends,
    assert_near,
    fast_backends,
    load_backend,
    outputs_and_gradients,
    seeded,
)
from tests.helpers.triton_interpreter import one_launch_at_a_time

VECTORS = np.load(Path(__file__).parent / "pattention.npz", allow_pickle=False)
PUBLISHED = ["gelu_l2_norm", "l2_norm_gelu", "softmax"]
FAST = fast_backends(PATTENTION)
Single = Callable[[Tensor, Tensor, Tensor, str, int], Tensor]


def single(name: str) -> Single:
    """Returns a backend as a function of one projection."""
    function = load_backend(PATTENTION, name).function

    def apply(x: Tensor, key: Tensor, value: Tensor, theta: str, scale_base: int) -> Tensor:
        return function(x, [key], [value], theta=theta, scale_base=scale_base, rows=RowReduction())[0]

    return apply


def test_the_published_thetas_are_registered() -> None:
    assert set(PUBLISHED) <= set(THETAS)


@pytest.mark.parametrize("theta", PUBLISHED)
@pytest.mark.parametrize(("precision", "tolerance"), [("f64", 1e-12), ("f32", 2e-5)])
@pytest.mark.parametrize("name", all_backends(PATTENTION))
def test_agrees_with_the_published_numbers(theta: str, precision: str, tolerance: float, name: str) -> None:
    """Errors relative to a tensor's largest element: in float32 the published softmax gradients, which cancel, are
    themselves off by 8e-5 where the largest element is 118."""
    backend = load_backend(PATTENTION, name)

    def vector(key: str) -> Tensor:
        return torch.from_numpy(VECTORS[f"{theta}.{precision}.{key}"]).to(backend.device)

    if vector("input").dtype not in (backend.dtype, torch.float32):
        pytest.skip("computes in narrower number formats only")
    function = single(name)
    got = outputs_and_gradients(
        lambda leaves: function(*leaves, theta, leaves[1].shape[0]),
        [vector("input"), vector("key"), vector("value")],
        vector("probe"),
    )
    want = [vector(key).cpu() for key in ("output", "grad_input", "grad_key", "grad_value")]
    assert_near(got, want, tolerance)
    if precision == "f64":
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.cpu(), w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("theta", list(THETAS))
@pytest.mark.parametrize("num_projections", [1, 3])
@pytest.mark.parametrize("name", all_backends(PATTENTION))
def test_backend_computes_the_definition_also_with_a_pinned_scale(theta: str, num_projections: int, name: str) -> None:
    backend = load_backend(PATTENTION, name)
    shapes = [(2, 5, 8), *[(12, 8)] * num_projections, *[(12, 6)] * num_projections, (num_projections, 2, 5, 6)]
    *inputs, probe = backend.prepared(seeded(*shapes))

    def split(leaves: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        return leaves[0], leaves[1 : 1 + num_projections], leaves[1 + num_projections :]

    def definition(leaves: Sequence[Tensor]) -> Tensor:
        x, keys, values = split(leaves)
        return torch.stack([pattention_reference(x, k, v, theta, 5) for k, v in zip(keys, values, strict=True)])

    def by_backend(leaves: Sequence[Tensor]) -> Tensor:
        return backend.function(*split(leaves), theta=theta, scale_base=5, rows=RowReduction())

    *wide, wide_probe = [tensor.cpu().double() for tensor in (*inputs, probe)]
    want = outputs_and_gradients(definition, wide, wide_probe)
    assert_near(outputs_and_gradients(by_backend, inputs, probe), want, backend.tolerance)


@pytest.mark.parametrize("theta", list(THETAS))
@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("name", FAST)
def test_without_gradients_the_outputs_are_the_same(theta: str, length: int, name: str) -> None:
    backend = load_backend(PATTENTION, name)
    x, *tokens = backend.prepared(seeded((2, length, 6), *[(5, 6)] * 3, *[(5, 4)] * 3))
    options = {"theta": theta, "scale_base": 3, "rows": RowReduction()}
    want = backend.function(x, tokens[:3], tokens[3:], **options)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got = backend.function(x, tokens[:3], tokens[3:], **options)
        assert_near([got], [want.cpu()], backend.tolerance)


@pytest.mark.parametrize("theta", list(THETAS))
@pytest.mark.parametrize("name", FAST)
def test_gradients_are_those_of_finite_differences(theta: str, name: str) -> None:
    backend = load_backend(PATTENTION, name)
    if backend.dtype != torch.float64:
        pytest.skip("finite differences need float64")
    drawn = seeded((1, 3, 4), (6, 4), (6, 4), (6, 5), (6, 5))
    inputs = [t.requires_grad_() for t in backend.prepared(drawn)]

    def function(x: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
        return backend.function(x, [k1, k2], [v1, v2], theta=theta, scale_base=4, rows=RowReduction())

    # Triton's interpreter takes milliseconds a row; fast mode checks one random combination of all derivatives.
    assert torch.autograd.gradcheck(function, inputs, fast_mode=name == "triton")


class TwoRanks:
    """Two threads that reduce over each other as two tensor-parallel ranks do."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.values: list[Tensor | None] = [None, None]

    def rows(self, rank: int) -> RowReduction:
        """Returns the row reduction of one rank."""

        def reduced(function: Callable[[Tensor, Tensor], Tensor], own: Tensor) -> Tensor:
            self.values[rank] = own.clone()
            self.barrier.wait()
            result = function(*self.values)
            self.barrier.wait()
            return result

        return RowReduction(sum=lambda t: reduced(torch.add, t), max=lambda t: reduced(torch.maximum, t))


@pytest.mark.parametrize("theta", list(THETAS))
@pytest.mark.parametrize("name", FAST)
def test_halves_of_the_tokens_sum_to_the_whole(theta: str, name: str) -> None:
    """Two halves of the tokens, whose row statistics are completed by the other's: forward and backward."""
    backend = load_backend(PATTENTION, name)
    x, key, value, probe = backend.prepared(seeded((1, 7, 8), (12, 8), (12, 6), (1, 7, 6)))
    wide = [tensor.cpu().double() for tensor in (x, key, value, probe)]
    want = outputs_and_gradients(lambda leaves: pattention_reference(*leaves, theta, 12), wide[:3], wide[3])
    ranks, halves = TwoRanks(), (slice(0, 6), slice(6, 12))

    def half(rank: int) -> list[Tensor]:
        own = halves[rank]
        options = {"theta": theta, "scale_base": 12, "rows": ranks.rows(rank)}
        return outputs_and_gradients(
            lambda leaves: backend.function(leaves[0], [leaves[1]], [leaves[2]], **options)[0],
            [x, key[own], value[own]],
            probe,
        )

    with one_launch_at_a_time(), ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(half, range(2)))
    (y0, dx0, dk0, dv0), (y1, dx1, dk1, dv1) = parts
    got = [y0 + y1, dx0 + dx1, torch.cat((dk0, dk1)), torch.cat((dv0, dv1))]
    assert_near(got, want, backend.tolerance)


def test_the_reference_refuses_split_tokens() -> None:
    x, key, value = seeded((1, 2, 4), (6, 4), (6, 4))
    with pytest.raises(ValueError, match="all parameter tokens on one rank"):
        PATTENTION["reference"].load()(
            x, [key], [value], theta="softmax", scale_base=6, rows=RowReduction(sum=lambda t: t)
        )


@pytest.mark.parametrize("theta", PUBLISHED)
@pytest.mark.parametrize("name", all_backends(PATTENTION))
@pytest.mark.parametrize("tiny", [0.0, 1e-30])
def test_a_row_that_vanishes_gives_zero_and_no_gradient(theta: str, name: str, tiny: float) -> None:
    """The published code gives NaN (zero_input in the vectors); softmax of zeros is uniform."""
    device = load_backend(PATTENTION, name).device
    key = torch.from_numpy(VECTORS[f"{theta}.zero_input.key"]).to(device)
    value = torch.from_numpy(VECTORS[f"{theta}.zero_input.value"]).to(device)
    x = torch.full((2, 1, key.shape[1]), tiny, device=device)
    x[1] = 1.0
    y, *gradients = outputs_and_gradients(
        lambda leaves: single(name)(*leaves, theta, key.shape[0]),
        [x, key, value],
        torch.ones(2, 1, value.shape[1], device=device),
    )
    want = value.sum(0) if theta == "softmax" else torch.zeros_like(value[0])
    torch.testing.assert_close(y[0, 0], want, rtol=2e-5, atol=2e-5)
    assert all(gradient.isfinite().all() for gradient in gradients)
    if theta != "softmax":
        assert (gradients[0][0] == 0).all()
        assert (gradients[0][1] != 0).any()


@pytest.mark.parametrize("theta", list(THETAS))
@pytest.mark.parametrize("name", all_backends(PATTENTION))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_ten_thousand_stay_finite_in_half_precision(theta: str, name: str, dtype: torch.dtype) -> None:
    device = load_backend(PATTENTION, name).device
    x, key, value, probe = (t.to(device) for t in seeded((1, 4, 16), (32, 16), (32, 8), (1, 4, 8), dtype=dtype))
    x = x * (1e4 / float((x.float() @ key.float().T).abs().max()))
    assert float((x.float() @ key.float().T).abs().max()) > 9e3
    x[:, 2] = 0
    results = outputs_and_gradients(lambda leaves: single(name)(*leaves, theta, 32), [x, key, value], probe)
    assert all(result.dtype == dtype and result.isfinite().all() for result in results)
    assert results[0].abs().max() > 0


@pytest.mark.parametrize("theta", list(THETAS))
@pytest.mark.parametrize("name", all_backends(PATTENTION))
def test_bfloat16_differs_from_float64_by_rounding_only(theta: str, name: str) -> None:
    device = load_backend(PATTENTION, name).device
    inputs = seeded((1, 64, 32), (48, 32), (48, 24), (1, 64, 24), dtype=torch.bfloat16)
    want = outputs_and_gradients(
        lambda leaves: pattention_reference(*leaves, theta, 48), [t.double() for t in inputs[:3]], inputs[3].double()
    )
    there = [t.to(device) for t in inputs]
    got = outputs_and_gradients(lambda leaves: single(name)(*leaves, theta, 48), there[:3], there[3])
    for g, w in zip(got, want, strict=True):
        assert float((g.cpu().double() - w).norm() / w.norm()) < 0.02


@pytest.mark.parametrize("theta", list(THETAS))
def test_the_closed_form_saves_inputs_scores_and_statistics_but_no_weights(theta: str) -> None:
    x, key, value = (t.requires_grad_() for t in seeded((1, 10, 8), (16, 8), (16, 8), dtype=torch.float32))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        single("eager")(x, key, value, theta, 16)
    activations = sorted(t.numel() for t in saved if t.data_ptr() not in {key.data_ptr(), value.data_ptr()})
    statistics = THETAS[theta].statistic(torch.ones(10, 1, 16), 16, RowReduction()).numel()
    assert activations == sorted([statistics, 10 * 8, 10 * 16])


@pytest.mark.parametrize("theta", list(THETAS))
@pytest.mark.parametrize("name", FAST)
def test_recomputation_and_no_grad_change_nothing(theta: str, name: str) -> None:
    backend, function = load_backend(PATTENTION, name), single(name)
    x, key, value, probe = backend.prepared(seeded((1, 5, 8), (16, 8), (16, 6), (1, 5, 6)))
    want = outputs_and_gradients(lambda leaves: function(*leaves, theta, 16), [x, key, value], probe)
    got = outputs_and_gradients(
        lambda leaves: checkpoint(function, *leaves, theta, 16, use_reentrant=False), [x, key, value], probe
    )
    with torch.no_grad():
        y = function(x, key.requires_grad_(), value, theta, 16)
    assert not y.requires_grad
    if name == "compile":  # which compiles anew without gradients, and orders sums otherwise
        assert_near([*got, y], [*want, want[0]], backend.tolerance)
    else:
        assert all(torch.equal(g, w) for g, w in zip([*got, y], [*want, want[0]], strict=True))


@pytest.mark.parametrize("name", all_backends(PATTENTION))
def test_without_an_input_gradient_the_tokens_still_get_theirs(name: str) -> None:
    x, key, value, probe = load_backend(PATTENTION, name).prepared(seeded((1, 5, 8), (16, 8), (16, 6), (1, 5, 6)))
    key.requires_grad_()
    single(name)(x, key, value, "l2_norm_gelu", 16).backward(probe)
    assert key.grad is not None
    assert x.grad is None


@pytest.mark.parametrize("split", [False, True])
def test_compiled_passes_are_traced(split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile makes of them is left to the full tests; here its graphs run as they are.

    Without other ranks each pass is one graph for all shapes; a sum over ranks stays outside of graphs.
    """
    graphs: list[torch.fx.GraphModule] = []
    rows = RowReduction(sum=lambda values: 2 * values, max=lambda values: values) if split else RowReduction()

    def as_it_is(graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def results(name: str, length: int) -> list[Tensor]:
        *leaves, probe = seeded((2, length, 8), (12, 8), (12, 6), (1, 2, length, 6))
        function = functions[name]
        return outputs_and_gradients(
            lambda leaves: function(
                leaves[0], [leaves[1]], [leaves[2]], theta="l2_norm_gelu", scale_base=12, rows=rows
            ),
            leaves,
            probe,
        )

    functions = {name: PATTENTION[name].load() for name in ("compile", "eager")}
    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=as_it_is))
        for length in (3, 5, 7):
            assert_near(results("compile", length), results("eager", length), 1e-12)
    assert split or len(graphs) == 2
