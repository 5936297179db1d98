"""Statistics of attention probabilities by which lazy layers show, and the nulls to read them against.

The approximate rank k* and the column mass m* are those of "When Attention Collapses" (Sanyal et al. 2024,
arXiv:2404.08634v4): MaxRank of a layer is the largest k* of its heads, AvgMass the mean m* of its heads.

Low rank alone is no laziness. Of two heads that have learned nothing, one that attends to all earlier tokens alike has
k* = 5 and m* = 30 at 100 tokens and tau = 0.9, and one that attends to the first token alone has 1 and 1.

Shape letters: see megatron/README.md. Rows of probabilities are queries, columns keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

TAU = 0.9
"""Share of the squared Frobenius norm that k* and m* reach, as in the paper."""
ROUNDING = 1e-12
"""A share that misses tau by rounding alone reaches it."""
MATRICES_AT_A_TIME = 256
"""Matrices whose eigenvalues are computed at a time."""


@dataclass(frozen=True)
class Statistic:
    """One number per head, of which a layer's is made."""

    name: str
    label: str
    """Quantity and unit, for figures."""
    of_layer: str
    """How the heads of a layer become the layer's number: `max` or `mean`."""


STATISTICS = (
    Statistic("rank", "approximate rank k*", "max"),
    Statistic("column_mass", "column mass m* [columns]", "mean"),
    Statistic("entropy", "entropy [nats]", "mean"),
    Statistic("sink_mass", "mass on the first token", "mean"),
)
HeadStatistics = Mapping[str, Tensor]
"""Statistic's name -> its value for each head and layer [L, H], float64, mean over sequences."""


def head_statistics(probabilities_BHSS: Tensor, tau: float = TAU) -> dict[str, Tensor]:
    """Computes every statistic for each sequence and head: [B, H], float64."""
    a_BHSS = probabilities_BHSS.double()
    return {
        "rank": approximate_rank(a_BHSS, tau),
        "column_mass": column_mass(a_BHSS, tau),
        "entropy": entropy(a_BHSS),
        "sink_mass": sink_mass(a_BHSS),
    }


def approximate_rank(a_BHSS: Tensor, tau: float = TAU) -> Tensor:
    """Computes k*: the least number of singular values whose squares sum to `tau` of all squares, float64."""
    matrices = a_BHSS.double().flatten(0, -3)
    # The eigenvalues of A A^T are the squares of the singular values of A.
    squares = [torch.linalg.eigvalsh(part @ part.mT).flip(-1) for part in torch.split(matrices, MATRICES_AT_A_TIME)]
    return _least_number(torch.cat(squares), tau).view(a_BHSS.shape[:-2])


def column_mass(a_BHSS: Tensor, tau: float = TAU) -> Tensor:
    """Computes m*: the least number of columns whose squared norms sum to `tau` of the squared Frobenius norm."""
    return _least_number(a_BHSS.double().square().sum(-2).sort(-1, descending=True).values, tau)


def entropy(a_BHSS: Tensor) -> Tensor:
    """Computes the entropy of each query's distribution, mean over the queries [nats]."""
    of_query_BHS: Tensor = torch.special.entr(a_BHSS.double()).sum(-1)
    return of_query_BHS.mean(-1)


def sink_mass(a_BHSS: Tensor) -> Tensor:
    """Computes the probability on the first token, mean over the queries after it, which alone have a choice."""
    return a_BHSS.double()[..., 1:, 0].mean(-1)


def _least_number(descending: Tensor, tau: float) -> Tensor:
    """Counts the leading entries whose sum reaches `tau` of the sum of all, along the last dimension; float64."""
    shares = descending.cumsum(-1) / descending.sum(-1, keepdim=True)
    return (shares < tau - ROUNDING).sum(-1).double() + 1.0


def uniform_causal(length: int) -> Tensor:
    """Returns the probabilities [S, S] of a head that attends to itself and all earlier tokens alike."""
    return torch.ones(length, length, dtype=torch.float64).tril() / torch.arange(1, length + 1).unsqueeze(-1)


def pure_sink(length: int) -> Tensor:
    """Returns the probabilities [S, S] of a head that attends to the first token alone."""
    a_SS = torch.zeros(length, length, dtype=torch.float64)
    a_SS[:, 0] = 1.0
    return a_SS


NULLS = {"uniform causal": uniform_causal, "pure sink": pure_sink}
"""Heads that have learned nothing, by name."""


def null_statistics(length: int, tau: float = TAU) -> dict[str, dict[str, float]]:
    """Returns every statistic of every null at sequences of `length` tokens."""
    return {
        name: {key: float(value) for key, value in head_statistics(make(length)[None, None], tau).items()}
        for name, make in NULLS.items()
    }


def layer_statistics(heads: HeadStatistics) -> dict[str, Tensor]:
    """Returns each statistic of each layer [L]: the largest rank of its heads, and the mean of the others."""
    return {
        each.name: heads[each.name].amax(-1) if each.of_layer == "max" else heads[each.name].mean(-1)
        for each in STATISTICS
    }
