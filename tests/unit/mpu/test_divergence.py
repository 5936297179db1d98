"""Divergences between teacher and student against a plain float64 loop, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron.mpu.context import ParallelContext
from megatron.mpu.divergence import vocab_parallel_divergence

SINGLE = ParallelContext.single()
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")
TOKENS, ROWS = 20, 24


def logits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = 3 * torch.randn(2, 2, 5, ROWS, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def distribution(row: list[float], temperature: float) -> list[float]:
    weights = [math.exp(x / temperature) for x in row[:TOKENS]]
    return [weight / sum(weights) for weight in weights]


def kl(a: list[float], b: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def plain(student: list[float], teacher: list[float], divergence: str, temperature: float) -> float:
    """T^2 D of one position, as the definition says it."""
    q, p = distribution(student, temperature), distribution(teacher, temperature)
    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    value = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jensen_shannon": (kl(p, m) + kl(q, m)) / 2}
    return temperature**2 * value[divergence]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_and_gradient_equal_a_plain_loop(divergence: str, temperature: float) -> None:
    student, teacher = logits()
    student.requires_grad_()
    found = vocab_parallel_divergence(student, teacher, divergence, temperature, TOKENS, SINGLE)
    weights = torch.rand(found.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (found * weights).sum().backward()
    assert student.grad is not None
    step = 1e-6
    for b in range(2):
        for s in range(5):
            ours, theirs = student[b, s].tolist(), teacher[b, s].tolist()
            assert found[b, s].item() == pytest.approx(plain(ours, theirs, divergence, temperature), rel=1e-12)
            for v in range(ROWS):
                up, down = ([*ours[:v], ours[v] + sign * step, *ours[v + 1 :]] for sign in (1, -1))
                slope = plain(up, theirs, divergence, temperature) - plain(down, theirs, divergence, temperature)
                want = float(weights[b, s]) * slope / (2 * step)
                assert float(student.grad[b, s, v]) == pytest.approx(want, abs=1e-8)
    assert (student.grad[..., TOKENS:] == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_like_its_teacher_has_nothing_to_learn(divergence: str) -> None:
    _, teacher = logits()
    student = (teacher + 7.0).requires_grad_()
    student.data[..., TOKENS:] = 100.0
    found = vocab_parallel_divergence(student, teacher, divergence, 2.0, TOKENS, SINGLE)
    found.sum().backward()
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_at_a_high_temperature_it_is_half_the_squared_distance_of_centred_logits(divergence: str) -> None:
    """T^2 KL tends to |centred difference|^2 / 2V (Hinton et al. 2015, equation 4), and Jensen-Shannon to a quarter."""
    student, teacher = logits()
    found = vocab_parallel_divergence(student, teacher, divergence, 1e3, TOKENS, SINGLE)
    difference = (student - teacher)[..., :TOKENS]
    want = (difference - difference.mean(-1, keepdim=True)).square().sum(-1) / (2 * TOKENS)
    torch.testing.assert_close(found, want / (4 if divergence == "jensen_shannon" else 1), rtol=2e-2, atol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_half_precision_loses_nothing_further_and_extremes_stay_finite(divergence: str) -> None:
    student, teacher = logits(torch.bfloat16)
    student.requires_grad_()
    found = vocab_parallel_divergence(student, teacher, divergence, 1.0, TOKENS, SINGLE)
    want = vocab_parallel_divergence(student.double(), teacher.double(), divergence, 1.0, TOKENS, SINGLE)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
    large = (1e6 * student.detach().float()).requires_grad_()
    far = vocab_parallel_divergence(large, -1e6 * teacher.float(), divergence, 1.0, TOKENS, SINGLE)
    far.sum().backward()
    assert far.isfinite().all()
    assert large.grad is not None and large.grad.isfinite().all()
