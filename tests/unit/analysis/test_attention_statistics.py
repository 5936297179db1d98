"""Statistics of attention against their definitions, closed forms, and the singular values of another routine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.analysis.attention_statistics import (
    approximate_rank,
    column_mass,
    head_statistics,
    layer_statistics,
    null_statistics,
    pure_sink,
    uniform_causal,
)


def random_attention() -> Tensor:
    """Causal probabilities [3, 4, 20, 20], from nearly uniform to nearly one-hot."""
    generator = torch.Generator().manual_seed(6)
    scores = torch.randn(3, 4, 20, 20, generator=generator, dtype=torch.float64)
    scores *= torch.tensor([0.1, 1.0, 5.0, 50.0]).view(4, 1, 1)
    return scores.masked_fill(torch.ones(20, 20, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def test_nulls_of_the_paper() -> None:
    nulls = null_statistics(100, 0.9)
    assert (nulls["uniform causal"]["rank"], nulls["uniform causal"]["column_mass"]) == (5, 30)
    assert (nulls["pure sink"]["rank"], nulls["pure sink"]["column_mass"]) == (1, 1)


@pytest.mark.parametrize("length", [2, 10, 100])
def test_entropy_and_sink_of_the_nulls_in_closed_form(length: int) -> None:
    nulls = null_statistics(length)
    uniform, sink = nulls["uniform causal"], nulls["pure sink"]
    assert uniform["entropy"] == pytest.approx(math.lgamma(length + 1) / length, rel=1e-13)
    assert uniform["sink_mass"] == pytest.approx(
        math.fsum(1 / i for i in range(2, length + 1)) / (length - 1), rel=1e-13
    )
    assert (sink["entropy"], sink["sink_mass"]) == (0, 1)


def test_rank_and_columns_of_the_uniform_head_by_their_sums() -> None:
    """Column j has the squared norm sum of 1/i^2 over i >= j; numpy's singular values stand in for a closed form."""
    a = uniform_causal(100).numpy()
    columns = [math.fsum(1 / i**2 for i in range(j, 101)) for j in range(1, 101)]
    shares = np.cumsum(columns) / math.fsum(columns)
    assert shares[28] < 0.9 <= shares[29]
    squares = np.linalg.svd(a, compute_uv=False) ** 2
    shares = np.cumsum(squares) / squares.sum()
    assert shares[3] < 0.9 <= shares[4]


@pytest.mark.parametrize("tau", [0.5, 0.8, 0.9, 0.95])
def test_a_diagonal_head_needs_its_share_of_all(tau: float) -> None:
    eye = torch.eye(100, dtype=torch.float64)[None, None]
    assert approximate_rank(eye, tau).item() == column_mass(eye, tau).item() == round(100 * tau)


@pytest.mark.parametrize("tau", [0.8, 0.9, 0.95])
def test_every_head_and_sequence_equals_the_definition(tau: float) -> None:
    a = random_attention()
    found = head_statistics(a.float(), tau)
    assert all(value.shape == (3, 4) and value.dtype == torch.float64 for value in found.values())
    for b in range(3):
        for h in range(4):
            matrix = a[b, h].float().double().numpy()
            squares = np.linalg.svd(matrix, compute_uv=False) ** 2
            norms = np.sort((matrix**2).sum(0))[::-1]
            for name, parts in (("rank", squares), ("column_mass", norms)):
                want = next(k for k in range(1, 21) if parts[:k].sum() >= tau * parts.sum())
                assert found[name][b, h].item() == want
            rows = [-math.fsum(p * math.log(p) for p in row if p > 0) for row in matrix]
            assert found["entropy"][b, h].item() == pytest.approx(sum(rows) / 20, rel=1e-12)
            assert found["sink_mass"][b, h].item() == pytest.approx(matrix[1:, 0].mean(), rel=1e-12)


def test_a_layer_has_the_largest_rank_and_the_mean_of_the_rest() -> None:
    heads = {name: torch.tensor([[1.0, 3.0], [5.0, 2.0]]) for name in ("rank", "column_mass", "entropy", "sink_mass")}
    layers = layer_statistics(heads)
    assert layers["rank"].tolist() == [3.0, 5.0]
    assert all(layers[name].tolist() == [2.0, 3.5] for name in ("column_mass", "entropy", "sink_mass"))


def test_low_rank_alone_is_not_laziness() -> None:
    """The uniform head is of low rank and yet uses every column."""
    both = torch.stack((uniform_causal(100), pure_sink(100)))[None]
    assert approximate_rank(both)[0].tolist() == [5, 1]
    assert column_mass(both)[0].tolist() == [30, 1]
