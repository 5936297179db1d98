"""`thetas/l2_norm_gelu.py` in Triton. The row's sum is that of a^2; r is its only factor."""

from __future__ import annotations

import triton
import triton.language as tl

from megatron.kernels.pattention.triton_theta import (
    TRITON_THETAS,
    TritonTheta,
    gelu,
    gelu_derivative,
    length_factors,
    sum_over_ranks,
)


@triton.jit
def accumulate(first, second, a, inside):
    return first + tl.sum(a * a, 0), second


@triton.jit
def weights(a, r, other):
    return gelu(a * r)


@triton.jit
def product(g, a, r, other):
    u = a * r
    return g * gelu_derivative(u) * u


@triton.jit
def gradient(g, a, projection, r, other):
    u = a * r
    return r * (g * gelu_derivative(u) - u * projection)


TRITON_THETAS.register("l2_norm_gelu")(
    TritonTheta(
        start=0.0,
        accumulate=accumulate,
        complete=sum_over_ranks,
        factors=length_factors,
        weights=weights,
        product=product,
        gradient=gradient,
    )
)
