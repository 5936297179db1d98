"""Triton's kernels of Pattention's rows: at the sizes that are trained, counted, and compiled for GPUs without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.kernels.pattention.closed_form import RowPasses
from megatron.kernels.pattention.eager_passes import EagerPasses
from megatron.kernels.pattention.pattention import PATTENTION
from megatron.kernels.pattention.theta import RowReduction
from tests.helpers.forkserver import ROOT
from tests.helpers.kernel_backends import assert_near, seeded
from tests.helpers.triton_interpreter import counted_traffic

pytest.importorskip("triton", reason="the package 'triton' is not installed")

from megatron.kernels.pattention.triton_passes import LARGEST_ROW, TritonPasses

PUBLISHED = {"150M": 768, "150M ffn": 3072, "450M": 1024, "900M": 1280, "1.5B": 1536, "1.5B ffn": 6144}
ODD = {"one": 1, "odd": 1001, "a block": LARGEST_ROW, "a block and one": LARGEST_ROW + 1, "largest grown": 34480}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THETA_NAMES = ["l2_norm_gelu", "gelu_l2_norm", "softmax"]


class OtherRank:
    """The other of two ranks, which holds the same scores and gradients: it doubles sums."""

    rows = RowReduction(sum=lambda values: 2 * values, max=lambda values: values)


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Draws normal numbers where the kernels run: on a GPU, or in Triton's interpreter."""
    return [tensor.to(DEVICE) for tensor in seeded(*shapes, dtype=dtype)]


def passes_agree(theta: str, num_tokens: int, rows: RowReduction) -> list[list[Tensor]]:
    """Weights and both results of the backward pass, of Triton and of the float64 formulas on the same numbers."""
    a, g = drawn((2, 1, num_tokens), (2, 1, num_tokens), dtype=torch.float32)
    results = []
    for passes, dtype in ((TritonPasses(theta), torch.float32), (EagerPasses(theta), torch.float64)):
        scores, gradient = a.to(dtype, copy=True), g.to(dtype, copy=True)
        h, statistic = passes.weigh(scores, num_tokens, rows)
        again, da = passes.differentiate(
            gradient, scores, statistic, scale_base=num_tokens, rows=rows, scores_are_spent=True
        )
        results.append([h, again, da])
    return results


@pytest.mark.parametrize("theta", THETA_NAMES)
@pytest.mark.parametrize("size", [*PUBLISHED, *ODD])
def test_rows_of_trained_and_odd_sizes(theta: str, size: str) -> None:
    """Float64 formulas are those that tests/unit/kernels/test_pattention.py holds against the definition."""
    for got, want in zip(*passes_agree(theta, (PUBLISHED | ODD)[size], RowReduction()), strict=True):
        # Of a single score the weight depends on no more than its sign, and the gradient is 0.
        assert float((got.double() - want).abs().max()) <= 2e-6 * max(float(want.abs().max()), 1.0)


@pytest.mark.parametrize("theta", THETA_NAMES)
@pytest.mark.parametrize("num_tokens", [768, LARGEST_ROW + 5])
def test_rows_that_ranks_share(theta: str, num_tokens: int) -> None:
    got, want = passes_agree(theta, num_tokens, OtherRank.rows)
    assert_near(got, want, 2e-6)


@pytest.mark.parametrize("theta", THETA_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_eager(theta: str, dtype: torch.dtype) -> None:
    """Errors in the norm against float64 of the same numbers, forward and backward."""
    a, g = drawn((4, 1, 768), (4, 1, 768), dtype=dtype)

    def results(passes: RowPasses, number: torch.dtype) -> list[Tensor]:
        scores, gradient = a.to(number, copy=True), g.to(number, copy=True)
        h, statistic = passes.weigh(scores, 768, RowReduction())
        options: Any = {"scale_base": 768, "rows": RowReduction(), "scores_are_spent": True}
        return [h, *passes.differentiate(gradient, scores, statistic, **options)]

    want = results(EagerPasses(theta), torch.float64)
    errors = [
        [float((x.double() - w).norm() / w.norm()) for x, w in zip(results(passes, dtype), want, strict=True)]
        for passes in (TritonPasses(theta), EagerPasses(theta))
    ]
    for triton, eager in zip(*errors, strict=True):
        assert triton <= 1.001 * eager


@pytest.mark.parametrize("retain_graph", [False, True])
def test_the_scores_memory_is_taken_over_only_when_nobody_reads_them_again(retain_graph: bool) -> None:
    x, key, value, probe = drawn((1, 3, 8), (16, 8), (16, 6), (1, 3, 6), dtype=torch.float32)
    leaves = [leaf.requires_grad_() for leaf in (x, key, value)]
    options: Any = {"theta": "l2_norm_gelu", "scale_base": 16, "rows": RowReduction()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = PATTENTION["triton"].load()(x, [key], [value], **options)[0]
    scores = next(tensor for tensor in saved if tensor.shape == (3, 1, 16))
    before = scores.clone()
    first = torch.autograd.grad(y, leaves, probe, retain_graph=retain_graph)
    assert torch.equal(scores, before) == retain_graph
    if retain_graph:
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y, leaves, probe), strict=True))


class DispatchedTraffic(TorchDispatchMode):
    """Counts torch's operations on tensors as large as the scores, and the bytes of those that they read and write."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.kernels, self.bytes = elements, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.is_view or "empty" in str(function):
            return result
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.numel() == self.elements]
        written = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.numel() == self.elements]
        if read or written:
            self.kernels += 1
            self.bytes += sum(t.numel() * t.element_size() for t in (*read, *written))
        return result


def counted(passes: RowPasses, rows: RowReduction) -> Iterator[tuple[int, float]]:
    """Yields kernels, and bytes per score that they move, of the forward and of the backward pass, in bf16."""
    shape = (2, 3, 256)
    a, g = drawn(shape, shape, dtype=torch.bfloat16)
    statistic = torch.empty(0)
    for backward in (False, True):
        with counted_traffic() as traffic, DispatchedTraffic(a.numel()) as dispatched:
            if backward:
                options: Any = {"scale_base": 256, "rows": rows, "scores_are_spent": True}
                passes.differentiate(g, a, statistic, **options)
            else:
                _, statistic = passes.weigh(a, 256, rows)
        in_triton = traffic.bytes_read + traffic.bytes_written
        yield traffic.launches + dispatched.kernels, (in_triton + dispatched.bytes) / a.numel()


PER_ROW = 24 / 256
"""Statistics, read and written once or twice for 256 scores [bytes per score]."""


@pytest.mark.parametrize("theta", THETA_NAMES)
def test_bytes_and_launches_per_score(theta: str) -> None:
    """Forward reads a and writes h; backward reads a and g, and writes h and da: 6 times 2 bytes, in two kernels.

    With other ranks, whose sums come between, it is twice the kernels and 3 reads more.
    """
    if DEVICE != "cpu":
        pytest.skip("kernels are counted in Triton's interpreter, which is off where there is a GPU")
    (kernels, forward), (more_kernels, backward) = counted(TritonPasses(theta), RowReduction())
    assert (kernels, more_kernels) == (1, 1)
    assert 4 <= forward <= 4 + PER_ROW
    assert 8 <= backward <= 8 + PER_ROW
    (kernels, forward), (more_kernels, backward) = counted(TritonPasses(theta), OtherRank.rows)
    assert (kernels, more_kernels) == (2, 2)
    assert 6 <= forward <= 6 + 2 * PER_ROW
    assert 12 <= backward <= 12 + 2 * PER_ROW


def test_bytes_and_launches_per_score_of_plain_operations() -> None:
    """What Triton saves, for the Theta that is published; a change here is a change of the eager path."""
    (kernels, forward), (more_kernels, backward) = counted(EagerPasses("l2_norm_gelu"), RowReduction())
    assert (kernels, forward) == (4, 22)
    assert (more_kernels, backward) == (10, 80)


WHOLE_PASS, SUMS_ALONE, SUMS_GIVEN = (True, True), (True, False), (False, True)


def assert_nothing_spills(cases: list[tuple[int, str, int]], parts: list[tuple[bool, bool]], cache: Path) -> None:
    """Compiles the parts of both passes for each (target, Theta, tokens): no stack, no local memory, wide loads."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.compile_ahead_of_time", json.dumps(cases), json.dumps(parts)],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == sum(1 if name == "rotary" else 2 * len(parts) for _, name, _ in cases)
    for *case, usage, wide in results:
        assert "STACK:0 " in usage, (case, usage)
        assert "LOCAL:0 " in usage, (case, usage)
        assert wide, case


def test_kernels_compile_for_a_gpu_without_one(tmp_path: Path) -> None:
    """To machine code for Hopper, without spilled registers, with loads of 128 bits."""
    assert_nothing_spills([(90, "l2_norm_gelu", 6144), (90, "rotary", 64)], [WHOLE_PASS], tmp_path)


@pytest.mark.full
def test_kernels_of_all_sizes_compile_for_all_gpus(tmp_path: Path) -> None:
    sizes = [768, 6144, LARGEST_ROW, 34480]
    cases = [(target, name, size) for target in (80, 90, 100) for name in THETA_NAMES for size in sizes]
    cases += [(target, "rotary", features) for target in (80, 90, 100) for features in (64, 80, 96)]
    assert_nothing_spills(cases, [WHOLE_PASS, SUMS_ALONE, SUMS_GIVEN], tmp_path)
