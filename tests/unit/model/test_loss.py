"""The objective against torch's cross entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.model.loss import CausalLMLoss
from megatron.mpu.context import ParallelContext

SINGLE = ParallelContext.single()


def batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(2, 5, 24, generator=generator, dtype=torch.float64)
    labels = torch.randint(20, (2, 5), generator=generator)
    counted = torch.rand(2, 5, generator=generator) < 0.6
    weights = counted.double() * counted.numel() / counted.sum()
    return logits.to(dtype).requires_grad_(), labels, weights


@pytest.mark.parametrize("num_valid", [None, 20])
def test_masked_mean_cross_entropy_and_its_gradient(num_valid: int | None) -> None:
    logits, labels, weights = batch()
    loss = CausalLMLoss(num_valid, SINGLE)(logits, (labels, weights))
    loss.backward()
    reference = logits.detach().clone().requires_grad_()
    counted = weights.bool()
    want = F.cross_entropy(reference[counted][:, :num_valid], labels[counted])
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(logits.grad, reference.grad, rtol=1e-13, atol=1e-13)


def test_half_precision_logits_lose_nothing_further() -> None:
    logits, labels, _ = batch(torch.bfloat16)
    ones = torch.ones(labels.shape)
    loss = CausalLMLoss(None, SINGLE)(logits, (labels, ones))
    want = F.cross_entropy(logits.detach().double().flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16


def test_many_losses_are_averaged_without_rounding() -> None:
    """A float32 sum of equal losses differs from their product; layouts would differ by how they sum."""
    length = 30_000
    logits = torch.zeros(1, length, 500)
    targets = (torch.zeros(1, length, dtype=torch.int64), torch.ones(1, length))
    loss = CausalLMLoss(None, SINGLE)(logits, targets)
    one = CausalLMLoss(None, SINGLE)(logits[:, :1], (targets[0][:, :1], targets[1][:, :1]))
    assert float(loss) == pytest.approx(float(one), rel=1e-14)


def test_extreme_logits_stay_finite() -> None:
    logits, labels, weights = batch(torch.float32)
    large = (logits * 1e6).detach().requires_grad_()
    loss = CausalLMLoss(None, SINGLE)(large, (labels, weights))
    loss.backward()
    assert loss.isfinite()
    assert large.grad.isfinite().all()


def test_a_batch_in_which_nothing_counts_has_no_loss_and_no_gradient() -> None:
    logits, labels, weights = batch()
    loss = CausalLMLoss(None, SINGLE)(logits, (labels, torch.zeros_like(weights)))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()
