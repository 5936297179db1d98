"""Communication pairs: what each returns, and that its backward is the transpose of its forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.mpu import collectives
from megatron.mpu.context import ParallelContext
from tests.helpers.distributed import run_distributed

WORLD = 4


def ranks_tensor(rank: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def apply(name: str, dim: int | None, shape: tuple[int, ...], grad_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    context = ParallelContext.create(WORLD, 1)
    x = ranks_tensor(context.tensor_rank, shape).requires_grad_()
    function: Callable[..., Tensor] = getattr(collectives, name)
    y = function(x, context) if dim is None else function(x, dim, context)
    (gradient,) = torch.autograd.grad(y, x, ranks_tensor(100 + context.tensor_rank, grad_shape))
    return y.detach(), gradient


SMALL, LARGE_1, LARGE_2 = (3, 4, 8), (3, 16, 8), (3, 4, 32)


def whole(offset: int, shape: tuple[int, ...], dim: int) -> Tensor:
    return torch.cat([ranks_tensor(offset + rank, shape) for rank in range(WORLD)], dim)


def total(offset: int, shape: tuple[int, ...]) -> Tensor:
    return sum(ranks_tensor(offset + rank, shape) for rank in range(WORLD))


def share(x: Tensor, dim: int, rank: int) -> Tensor:
    return x.chunk(WORLD, dim)[rank]


CASES = {  # function, dim, shape of x, shape of y, expected y by rank, expected gradient by rank
    "copy": ("copy", None, SMALL, SMALL, lambda r: ranks_tensor(r, SMALL), lambda r: total(100, SMALL)),
    "reduce": ("reduce", None, SMALL, SMALL, lambda r: total(0, SMALL), lambda r: ranks_tensor(100 + r, SMALL)),
    "gather sequence": (
        "gather",
        1,
        SMALL,
        LARGE_1,
        lambda r: whole(0, SMALL, 1),
        lambda r: share(total(100, LARGE_1), 1, r),
    ),
    "gather features": (
        "gather",
        -1,
        SMALL,
        LARGE_2,
        lambda r: whole(0, SMALL, 2),
        lambda r: share(total(100, LARGE_2), 2, r),
    ),
    "gather output": (
        "gather_output",
        -1,
        SMALL,
        LARGE_2,
        lambda r: whole(0, SMALL, 2),
        lambda r: share(ranks_tensor(100 + r, LARGE_2), 2, r),
    ),
    "reduce-scatter sequence": (
        "reduce_scatter",
        1,
        LARGE_1,
        SMALL,
        lambda r: share(total(0, LARGE_1), 1, r),
        lambda r: whole(100, SMALL, 1),
    ),
    "reduce-scatter features": (
        "reduce_scatter",
        -1,
        LARGE_2,
        SMALL,
        lambda r: share(total(0, LARGE_2), 2, r),
        lambda r: whole(100, SMALL, 2),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(case: str) -> None:
    name, dim, shape, grad_shape, output, gradient = CASES[case]
    for rank, (got_y, got_dx) in enumerate(run_distributed(apply, WORLD, name, dim, shape, grad_shape)):
        torch.testing.assert_close(got_y, output(rank), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(got_dx, gradient(rank), rtol=1e-14, atol=1e-14)


def statistics() -> tuple[Tensor, Tensor, Tensor]:
    context = ParallelContext.create(WORLD, 1)
    x = ranks_tensor(context.tensor_rank, SMALL)
    before = x.clone()
    results = collectives.sum_over_ranks(x, context), collectives.max_over_ranks(x, context)
    assert torch.equal(x, before)
    return *results, x


def test_statistics_over_ranks_leave_their_argument_alone() -> None:
    results = run_distributed(statistics, WORLD)
    everything = torch.stack([x for _, _, x in results])
    for got_sum, got_max, _ in results:
        torch.testing.assert_close(got_sum, everything.sum(0), rtol=1e-14, atol=1e-14)
        assert torch.equal(got_max, everything.amax(0))


def summed_over_data_ranks(tensor: int) -> tuple[int, float]:
    context = ParallelContext.create(tensor, 1)
    own = torch.tensor(10.0**context.data_rank + context.tensor_rank)
    return context.tensor_rank, float(collectives.sum_over_data_ranks(own, context))


def test_sums_over_data_ranks_stay_on_their_tensor_rank() -> None:
    assert run_distributed(summed_over_data_ranks, WORLD, 2) == [(0, 11.0), (1, 13.0), (0, 11.0), (1, 13.0)]
    assert run_distributed(summed_over_data_ranks, WORLD, 4) == [(rank, 1.0 + rank) for rank in range(WORLD)]
