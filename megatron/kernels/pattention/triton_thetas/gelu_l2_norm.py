"""`thetas/gelu_l2_norm.py` in Triton. The row's sum is that of gelu(a)^2; r is its only factor."""

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
    w = gelu(a)
    return first + tl.sum(w * w, 0), second


@triton.jit
def weights(a, r, other):
    return gelu(a) * r


@triton.jit
def product(g, a, r, other):
    return g * gelu(a) * r


@triton.jit
def gradient(g, a, projection, r, other):
    return r * (g - gelu(a) * r * projection) * gelu_derivative(a)


TRITON_THETAS.register("gelu_l2_norm")(
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
