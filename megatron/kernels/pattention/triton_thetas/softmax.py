"""`thetas/softmax.py` in Triton. The row's sums are its maximum m and z = sum(exp(a - m)); factors are m and s / z."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.pattention.theta import RowReduction
from megatron.kernels.pattention.triton_theta import TRITON_THETAS, TritonTheta


@triton.jit
def accumulate(first, second, a, inside):
    largest = tl.maximum(first, tl.max(tl.where(inside, a, float("-inf")), 0))
    seen = tl.sum(tl.where(inside, tl.exp(a - largest), 0.0), 0)
    return largest, second * tl.exp(first - largest) + seen


def complete(sums: Tensor, rows: RowReduction) -> Tensor:
    """Takes each rank's z to the maximum over all ranks, and adds them up."""
    own, total = sums.chunk(2, dim=-1)
    largest = rows.max(own)
    return torch.cat((largest, rows.sum(total * (own - largest).exp())), dim=-1)


@triton.jit
def factors(first, second, scale_base):
    return first, scale_base / second


@triton.jit
def weights(a, largest, factor):
    return tl.exp(a - largest) * factor


@triton.jit
def product(g, a, largest, factor):
    return g * tl.exp(a - largest) * factor


@triton.jit
def gradient(g, a, projection, largest, factor):
    return tl.exp(a - largest) * factor * (g - projection)


TRITON_THETAS.register("softmax")(
    TritonTheta(
        start=float("-inf"),
        accumulate=accumulate,
        complete=complete,
        factors=factors,
        weights=weights,
        product=product,
        gradient=gradient,
    )
)
