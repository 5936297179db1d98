"""What a layer sends: collectives by kind and elements, forward and backward, against the table in mpu/README.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron.config.model import ModelConfig, ParamTokenConfig
from megatron.model.layer import TransformerLayer
from megatron.mpu import context as context_module
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import initialize_parameters
from tests.helpers.distributed import run_distributed
from tests.helpers.models import tiny_pythia, tiny_tokenformer

BATCH, LENGTH, WIDTH = 2, 16, 32
T, TD = BATCH * LENGTH, BATCH * LENGTH * WIDTH
Sent = Counter[tuple[str, int]]
"""How often (kind, elements) was called; elements of the whole tensor, as every rank would hold it."""


@contextmanager
def counting() -> Iterator[Sent]:
    sent: Sent = Counter()

    def counted(kind: str, argument: int) -> Any:
        original = getattr(dist, kind)

        def call(*args: Any, **kwargs: Any) -> Any:
            sent[kind, args[argument].numel()] += 1
            return original(*args, **kwargs)

        return mock.patch.object(dist, kind, call)

    with counted("all_reduce", 0), counted("all_gather_single", 0), counted("reduce_scatter_single", 1):
        yield sent


def count(model: ModelConfig, sequence_parallel: bool) -> tuple[Sent, Sent]:
    context = ParallelContext.create(dist.get_world_size(), 1, sequence_parallel)
    layer = TransformerLayer(model, context)
    initialize_parameters(layer.named_parameters(), 1, context)
    length = LENGTH // context.tensor_size if sequence_parallel else LENGTH
    x = torch.randn(BATCH, length, WIDTH, requires_grad=True)
    with counting() as forward:
        y = layer(x)
    with counting() as backward:
        y.sum().backward()
    return forward, backward


def reduced(*elements: int) -> Sent:
    return Counter(("all_reduce", n) for n in elements)


def gathered(*elements: int) -> Sent:
    return Counter(("all_gather_single", n) for n in elements)


def scattered(*elements: int) -> Sent:
    return Counter(("reduce_scatter_single", n) for n in elements)


def tokenformer(theta: str) -> ModelConfig:
    return tiny_tokenformer(tokens=ParamTokenConfig(qkv=24, proj=16, ffn=40, theta=theta))


STATISTICS = reduced(3 * T, T, T)
CASES = {  # model, sequence parallel, forward, backward
    "tokenformer": (
        tokenformer("l2_norm_gelu"),
        False,
        STATISTICS + scattered(3 * TD) + gathered(TD) + reduced(TD, TD),
        STATISTICS + gathered(3 * TD) + scattered(TD) + reduced(TD, TD),
    ),
    "tokenformer, sequence": (
        tokenformer("gelu_l2_norm"),
        True,
        STATISTICS + gathered(TD, TD, TD) + scattered(3 * TD, TD, TD),
        STATISTICS + scattered(TD, TD, TD) + gathered(3 * TD, TD, TD),
    ),
    "tokenformer, softmax": (
        tokenformer("softmax"),
        False,
        STATISTICS + STATISTICS + scattered(3 * TD) + gathered(TD) + reduced(TD, TD),
        STATISTICS + gathered(3 * TD) + scattered(TD) + reduced(TD, TD),
    ),
    "pythia": (tiny_pythia(), False, reduced(TD, TD), reduced(TD, TD)),
    "pythia, sequence": (
        tiny_pythia(),
        True,
        gathered(TD, TD) + scattered(TD, TD),
        gathered(TD, TD) + scattered(TD, TD) + reduced(*[WIDTH] * 6),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_counts_equal_the_formula(case: str) -> None:
    model, sequence_parallel, want_forward, want_backward = CASES[case]
    for forward, backward in run_distributed(count, 2, model, sequence_parallel):
        assert forward == want_forward
        assert backward == want_backward


def volume(sent: Sent) -> Fraction:
    """In units of u = T D (tp - 1) / tp elements per rank; row statistics and small gradients are not counted."""
    weights = {"all_reduce": 2, "all_gather_single": 1, "reduce_scatter_single": 1}
    return sum(Fraction(weights[kind] * n * times, TD) for (kind, n), times in sent.items() if n >= TD)


def test_volumes_are_those_of_the_table() -> None:
    readme = (Path(context_module.__file__).parent / "README.md").read_text()
    for case, (_, _, forward, backward) in CASES.items():
        expected = 8 if case.startswith("tokenformer") else 4
        assert volume(forward) == volume(backward) == expected
    assert "| volume per layer, forward | 8u | 8u | 4u | 4u |" in readme
    assert "| volume per layer, backward | 8u | 8u | 4u | 4u |" in readme
