"""Pattention in blocks of rows: the bits of whole passes, for every Theta, and little memory for itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megatron.kernels.pattention.blocked_passes import BLOCK, BlockedPasses
from megatron.kernels.pattention.closed_form import closed_form_pattention
from megatron.kernels.pattention.eager_passes import EagerPasses
from megatron.kernels.pattention.theta import THETAS, RowReduction
from tests.helpers.new_tensors import LargestNewTensor

SIZES = [(3 * BLOCK // (3 * 96) + 5, 3, 96), (700, 1, 1001)]
"""Rows, projections and tokens: blocks of whole vectors, and tokens of which a block of 64 rows has them."""


@pytest.fixture(params=SIZES, ids=["aligned", "odd"])
def scores(request: pytest.FixtureRequest) -> Tensor:
    """Random scores [R, J, p] of several blocks, with a row of zeros in the last one."""
    scores = torch.randn(request.param, generator=torch.Generator().manual_seed(5))
    scores[-1] = 0.0
    return scores


def passed(kind: type[EagerPasses], theta: str, a: Tensor, *, spent: bool = False) -> Sequence[Tensor]:
    """Returns h and the statistic of the forward pass, and h and da of the backward pass."""
    g = a.flip(0).sin().to(a.dtype)
    passes, scale_base, rows = kind(theta), a.shape[-1], RowReduction()
    own = a.clone()
    h, statistic = passes.weigh(own, scale_base, rows)
    assert torch.equal(own, a), "the forward pass needs the scores again"
    again, da = passes.differentiate(g, own, statistic, scale_base=scale_base, rows=rows, scores_are_spent=spent)
    assert spent or torch.equal(own, a)
    return h, statistic, again, da


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("theta", list(THETAS))
def test_numbers_are_those_of_whole_passes_bit_for_bit(theta: str, dtype: torch.dtype, scores: Tensor) -> None:
    want = passed(EagerPasses, theta, scores.to(dtype))
    for spent in (False, True):
        got = passed(BlockedPasses, theta, scores.to(dtype), spent=spent)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))


@pytest.mark.parametrize(("kind", "is_blocked"), [(BlockedPasses, True), (EagerPasses, False)])
def test_passes_make_no_tensor_of_the_scores_size(kind: type[EagerPasses], is_blocked: bool) -> None:
    """But for the weights, which the forward pass returns."""
    a, g = torch.randn(2, 8 * BLOCK // 512, 1, 512).bfloat16()
    passes, rows = kind("l2_norm_gelu"), RowReduction()
    weights, statistic = passes.weigh(a, 512, rows)
    with LargestNewTensor() as backward:
        passes.differentiate(g, a, statistic, scale_base=512, rows=rows, scores_are_spent=True)
    assert (backward.nbytes <= 4 * BLOCK * torch.get_num_threads()) == is_blocked
    with LargestNewTensor() as forward:
        passes.weigh(a, 512, rows)
    assert (forward.nbytes == weights.nbytes) == is_blocked


def test_a_graph_that_is_kept_is_not_written_over() -> None:
    """Two backward passes of one forward pass of several blocks have the same gradients."""
    x = torch.randn(1, 3 * BLOCK // 256, 8, requires_grad=True)
    key, value = (torch.randn(256, 8, requires_grad=True) for _ in range(2))
    pattention = closed_form_pattention(BlockedPasses)
    y = pattention(x, [key], [value], theta="gelu_l2_norm", scale_base=256, rows=RowReduction())
    first = torch.autograd.grad(y.sum(), (x, key, value), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, key, value))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
