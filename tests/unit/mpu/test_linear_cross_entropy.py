"""Head and loss in chunks: against float64, against torch's own, and what it holds in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from megatron.model.loss import CausalLMLoss, FusedCausalLMLoss
from megatron.mpu import linear_cross_entropy
from megatron.mpu.context import ParallelContext
from tests.helpers.kernel_backends import assert_near, seeded
from tools.benchmarks.peak_memory import peak_bytes

Loss = FusedCausalLMLoss | CausalLMLoss
Targets = tuple[Tensor, Tensor]
SINGLE = ParallelContext.single()
NUM_VALID, PADDED = 61, 64


@pytest.fixture
def chunks_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts ten rows into four chunks, the last of one row."""
    monkeypatch.setitem(linear_cross_entropy.CHUNK_BYTES, "cpu", 3 * PADDED * 4)


def batch(dtype: torch.dtype, *, masked: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Head's input [2, 5, 12], matrix [64, 12], labels, and weights whose mean is 1."""
    x, weight = seeded((2, 5, 12), (PADDED, 12), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(NUM_VALID, (2, 5), generator=generator)
    counted = (torch.rand(2, 5, generator=generator) < 0.6) | torch.tensor(not masked)
    return x, weight, labels, counted.double() * counted.numel() / counted.sum()


def results(loss: Loss, x: Tensor, weight: Tensor, targets: Targets, factor: float = 0.7) -> list[Tensor]:
    """Loss, and the gradients of it times `factor`, as of a micro batch's share."""
    x, weight = (leaf.detach().clone().requires_grad_() for leaf in (x, weight))
    value = loss((x, weight), targets) if isinstance(loss, FusedCausalLMLoss) else loss(F.linear(x, weight), targets)
    (factor * value).backward()
    return [value.detach(), x.grad, weight.grad]


@pytest.mark.parametrize("num_valid", [None, NUM_VALID])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_equals_cross_entropy_of_whole_logits_in_float64(
    chunks_of_three: None, num_valid: int | None, masked: bool, dtype: torch.dtype, tolerance: float
) -> None:
    x, weight, labels, weights = batch(dtype, masked=masked)
    got = results(FusedCausalLMLoss(num_valid, SINGLE), x, weight, (labels, weights.to(dtype)))
    wide_x, wide_weight = (leaf.double().requires_grad_() for leaf in (x, weight))
    losses = F.cross_entropy((wide_x @ wide_weight.T).flatten(0, 1)[:, :num_valid], labels.flatten(), reduction="none")
    want = (losses * weights.flatten()).mean()
    (0.7 * want).backward()
    assert got[0].dtype == torch.float64
    assert_near(got, [want.detach(), wide_x.grad, wide_weight.grad], tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_by_whole_logits(chunks_of_three: None, dtype: torch.dtype) -> None:
    """Mean errors in the norm against float64 on the same numbers, over draws; for a fourth of the loss, as of four
    micro batches."""
    errors: list[list[float]] = []
    x, weight, labels, weights = batch(dtype)
    for draw in range(20):
        case = (x * (1 + draw / 16), weight, (labels, weights.float()), 0.25)
        want = results(CausalLMLoss(NUM_VALID, SINGLE), case[0].double(), weight.double(), (labels, weights), 0.25)
        for loss in (FusedCausalLMLoss(NUM_VALID, SINGLE), CausalLMLoss(NUM_VALID, SINGLE)):
            got = results(loss, *case)
            errors.append([float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)])
    ours, theirs = (torch.tensor(errors[first::2]).mean(0) for first in (0, 1))
    # On CPUs each of four chunks' products for the matrix is rounded before they are added.
    allowed = 1.02 * torch.hypot(theirs, torch.tensor([0.0, 0.0, torch.finfo(dtype).eps / 2 / 4**0.5]))
    assert (ours <= allowed).all(), (ours, theirs)


def test_equals_torchs_linear_cross_entropy(chunks_of_three: None) -> None:
    """Of another library's authors, in chunks of its own; it has neither weights of positions nor padding."""
    x, weight, labels, _ = batch(torch.float32)
    got = results(FusedCausalLMLoss(None, SINGLE), x, weight, (labels, torch.ones(2, 5)))
    x, weight = x.flatten(0, 1).requires_grad_(), weight.requires_grad_()
    value = F.linear_cross_entropy(x, weight, labels.flatten())
    (0.7 * value).backward()
    assert_near(got, [value.detach(), x.grad.view(2, 5, 12), weight.grad], 1e-6)


def test_gradients_are_those_of_finite_differences(chunks_of_three: None) -> None:
    x, weight, labels, weights = batch(torch.float64)
    loss = FusedCausalLMLoss(NUM_VALID, SINGLE)
    leaves = [leaf.requires_grad_() for leaf in (x, weight)]
    assert gradcheck(lambda x, weight: loss((x, weight), (labels, weights)), leaves, fast_mode=True)


def test_a_second_backward_pass_gives_the_same(chunks_of_three: None) -> None:
    x, weight, labels, weights = batch(torch.float32)
    leaves = [leaf.requires_grad_() for leaf in (x, weight)]
    value = FusedCausalLMLoss(None, SINGLE)((leaves[0], leaves[1]), (labels, weights))
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(value, leaves), strict=True))


def test_a_batch_in_which_nothing_counts_has_no_loss_and_no_gradient(chunks_of_three: None) -> None:
    x, weight, labels, weights = batch(torch.float32)
    value, *gradients = results(FusedCausalLMLoss(None, SINGLE), x, weight, (labels, torch.zeros_like(weights)))
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("scale", [1e6, 1e30])
def test_extreme_logits_stay_finite(chunks_of_three: None, scale: float) -> None:
    x, weight, labels, weights = batch(torch.float32)
    value, *gradients = results(FusedCausalLMLoss(NUM_VALID, SINGLE), x * scale, weight, (labels, weights))
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_fp16_sums_of_the_heads_matrix_do_not_overflow() -> None:
    """A chunk of 4,096 rows of the same label, whose input is 200: their plain sum is 13 times fp16's largest."""
    x, weight = torch.full((1, 4096, 4), 200.0, dtype=torch.float16), torch.zeros(8, 4, dtype=torch.float16)
    labels = torch.zeros(1, 4096, dtype=torch.int64)
    _, _, gradient = results(FusedCausalLMLoss(None, SINGLE), x, weight, (labels, torch.ones(1, 4096)))
    torch.testing.assert_close(gradient[0], torch.full((4,), -200 * 7 / 8 * 0.7).half(), rtol=2e-3, atol=0)


def test_logits_are_never_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 rows by 2,000 ids in 16 chunks: leaves, their gradients, and a chunk's wide logits; no copies of these."""
    monkeypatch.setitem(linear_cross_entropy.CHUNK_BYTES, "cpu", 64 * 2000 * 4)
    x, weight = seeded((2, 500, 16), (2000, 16), dtype=torch.float32)
    targets = (torch.randint(2000, (2, 500)), torch.ones(2, 500))
    logits, factors = 1000 * 2000 * 4, (1000 + 2000) * 16 * 4
    assert peak_bytes(lambda: results(CausalLMLoss(None, SINGLE), x, weight, targets)) > 2 * logits
    in_chunks = peak_bytes(lambda: results(FusedCausalLMLoss(None, SINGLE), x, weight, targets))
    assert in_chunks < 2.5 * factors + 1.5 * 64 * 2000 * 4
