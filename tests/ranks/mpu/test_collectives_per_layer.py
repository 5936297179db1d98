"""What a layer sends: collectives by kind and elements, forward and backward, against the table in mpu/README.md."""

from __future__ import annotations

import re
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

from megatron.config.sections.model import ModelConfig, ParamTokenConfig
from megatron.model.layer import TransformerLayer
from megatron.mpu import context as context_module
from megatron.mpu.collectives import ALL_GATHER, REDUCE_SCATTER
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import initialize_parameters
from tests.helpers.distributed import run_distributed
from tests.helpers.models import tiny_llama, tiny_pythia, tiny_tokenformer

BATCH, LENGTH, WIDTH = 2, 16, 32
R, RD = BATCH * LENGTH, BATCH * LENGTH * WIDTH
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

    with counted("all_reduce", 0), counted(ALL_GATHER, 0), counted(REDUCE_SCATTER, 1):
        yield sent


def count(model: ModelConfig, sequence_parallel: bool) -> tuple[Sent, Sent]:
    context = ParallelContext.create(dist.get_world_size(), 1, sequence_parallel)
    layer = TransformerLayer(model, context, 0)
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
    return Counter((ALL_GATHER, n) for n in elements)


def scattered(*elements: int) -> Sent:
    return Counter((REDUCE_SCATTER, n) for n in elements)


def tokenformer(theta: str) -> ModelConfig:
    return tiny_tokenformer(tokens=ParamTokenConfig(qkv=24, proj=16, ffn=40, theta=theta))


STATISTICS = reduced(3 * R, R, R)
CASES = {  # model, sequence parallel, forward, backward
    "tokenformer": (
        tokenformer("l2_norm_gelu"),
        False,
        STATISTICS + scattered(3 * RD) + gathered(RD) + reduced(RD, RD),
        STATISTICS + gathered(3 * RD) + scattered(RD) + reduced(RD, RD),
    ),
    "tokenformer, sequence": (
        tokenformer("gelu_l2_norm"),
        True,
        STATISTICS + gathered(RD, RD, RD) + scattered(3 * RD, RD, RD),
        STATISTICS + scattered(RD, RD, RD) + gathered(3 * RD, RD, RD),
    ),
    "tokenformer, softmax": (
        tokenformer("softmax"),
        False,
        STATISTICS + STATISTICS + scattered(3 * RD) + gathered(RD) + reduced(RD, RD),
        STATISTICS + gathered(3 * RD) + scattered(RD) + reduced(RD, RD),
    ),
    "pythia": (tiny_pythia(), False, reduced(RD, RD), reduced(RD, RD)),
    "llama": (tiny_llama(), False, reduced(RD, RD), reduced(RD, RD)),
    "llama, sequence": (
        tiny_llama(),
        True,
        gathered(RD, RD) + scattered(RD, RD),
        gathered(RD, RD) + scattered(RD, RD) + reduced(WIDTH, WIDTH),
    ),
    "pythia, sequence": (
        tiny_pythia(),
        True,
        gathered(RD, RD) + scattered(RD, RD),
        gathered(RD, RD) + scattered(RD, RD) + reduced(*[WIDTH] * 6),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_counts_equal_the_formula(case: str) -> None:
    model, sequence_parallel, want_forward, want_backward = CASES[case]
    for forward, backward in run_distributed(count, 2, model, sequence_parallel):
        assert forward == want_forward
        assert backward == want_backward


KINDS = {"AG": (ALL_GATHER, 1), "RS": (REDUCE_SCATTER, 1), "AR": ("all_reduce", 2)}
"""The table's words; how many u the exchange of one R x D tensor is, u = R D (tp - 1) / tp elements per rank."""


def volumes(sent: Sent) -> dict[str, Fraction]:
    """In units of u, by the table's words; row statistics and small gradients are not counted."""
    of_kind = {
        word: sum(Fraction(u * n * times, RD) for (kind, n), times in sent.items() if kind == name and n >= RD)
        for word, (name, u) in KINDS.items()
    }
    return {word: volume for word, volume in of_kind.items() if volume}


def table_rows() -> dict[str, list[str]]:
    """The cells of mpu/README.md's table, by the row's name."""
    readme = (Path(context_module.__file__).parent / "README.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in readme.splitlines() if line[:1] == "|"]
    return {name: columns for name, *columns in cells}


@pytest.mark.parametrize(
    ("column", "case"), [*enumerate(["tokenformer", "tokenformer, sequence", "pythia", "pythia, sequence"])]
)
def test_the_table_says_what_is_counted(column: int, case: str) -> None:
    _, _, forward, backward = CASES[case]
    rows = table_rows()
    said: Counter[str] = Counter()
    for name, columns in rows.items():
        if match := re.fullmatch(r"(AG|RS|AR) (\d*)u", columns[column]):
            assert "volume" not in name
            said[match[1]] += int(match[2] or 1)
    assert said == volumes(forward)
    conjugate = {"AG": "RS", "RS": "AG", "AR": "AR"}
    assert {conjugate[word]: volume for word, volume in said.items()} == volumes(backward)
    total = f"{sum(said.values())}u"
    assert [rows[f"volume per layer, {direction}"][column] for direction in ("forward", "backward")] == [total, total]
