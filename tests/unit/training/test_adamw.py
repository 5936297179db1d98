"""AdamW in parts of a tensor: the bits of torch's, and none of its temporary memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron.training.optimizers.adamw import PART, CacheBlockedAdamW
from tests.helpers.new_tensors import LargestNewTensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.full)])
def threads(request: pytest.FixtureRequest) -> int:
    """Lets torch compute with so many threads, which make parts larger and are each given a share of one."""
    before, number = torch.get_num_threads(), int(request.param)
    torch.set_num_threads(number)
    request.addfinalizer(lambda: torch.set_num_threads(before))
    return number


def three_steps(kind: type[torch.optim.AdamW], start: list[Tensor]) -> list[Tensor]:
    """Returns weights, moments and counts of steps, in which one weight has no gradient the second time."""
    weights = [nn.Parameter(each.clone()) for each in start]
    groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0}]
    optimizer = kind(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=False)
    for step in range(3):
        for weight in weights:
            weight.grad = weight.detach().sin() * 0.1**step
        if step == 1:
            weights[1].grad = None
        optimizer.step()
    states = [optimizer.state[weight] for weight in weights]
    assert [float(state["step"]) for state in states] == [3, 2, 3, 3, 3]
    return [weight.detach() for weight in weights] + [state[name] for state in states for name in MOMENTS]


def test_steps_are_torchs_bit_for_bit(threads: int) -> None:
    """Of a tensor of three parts, a matrix, a part exactly, nothing, and a large matrix that lies transposed."""
    generator = torch.Generator().manual_seed(3)
    size = threads * PART
    shapes = [(2 * size + 37,), (5, 3), (size,), (0,), (2, size // 2 + 1)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    start[-1] = start[-1].T
    pairs = zip(three_steps(CacheBlockedAdamW, start), three_steps(torch.optim.AdamW, start), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize(("kind", "parts"), [(CacheBlockedAdamW, 4), (torch.optim.AdamW, 1)])
def test_a_step_makes_no_tensor_that_is_larger_than_a_part(kind: type[torch.optim.AdamW], parts: int) -> None:
    """torch's own makes the root of a moment, and its quotient."""
    weight = nn.Parameter(torch.ones(4 * PART * torch.get_num_threads()))
    weight.grad = torch.ones_like(weight)
    optimizer = kind([weight], lr=1e-2, fused=False)
    optimizer.step()  # makes the moments
    with LargestNewTensor() as step:
        optimizer.step()
    assert step.nbytes == weight.nbytes // parts
