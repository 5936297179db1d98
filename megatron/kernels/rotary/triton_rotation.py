"""Rotation of queries and keys in one kernel of Triton, forward and backward.

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(q_BSHE: Tensor, k_BSGE: Tensor, cos_BS1r: Tensor, sin_BS1r: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries [B, S, H, E] and keys [B, S, G, E]."""
    rotated: tuple[Tensor, Tensor] = _Rotation.apply(q_BSHE, k_BSGE, cos_BS1r, sin_BS1r)
    return rotated


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back; nothing but the angles is saved."""

    @staticmethod
    def forward(ctx: Any, q_BSHE: Tensor, k_BSGE: Tensor, cos_BS1r: Tensor, sin_BS1r: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_BS1r, sin_BS1r)
        return _launch(q_BSHE, k_BSGE, cos_BS1r, sin_BS1r, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_BSHE: Tensor, dk_BSGE: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *_launch(dq_BSHE, dk_BSGE, *ctx.saved_tensors, back=True), None, None


def _launch(q_BSHE: Tensor, k_BSGE: Tensor, cos_BS1r: Tensor, sin_BS1r: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    batch, length, heads, features = q_BSHE.shape
    inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (q_BSHE, k_BSGE)]
    outputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    rotated = cos_BS1r.shape[-1]
    rotate_rows[(batch * length,)](
        *inputs,
        *outputs,
        cos_BS1r.contiguous(),
        sin_BS1r.contiguous(),
        length,
        heads,
        k_BSGE.shape[2],
        features,
        rotated // 2,
        *inputs[0].stride()[:3],
        *inputs[1].stride()[:3],
        ONE_TABLE=cos_BS1r.shape[0] == 1,
        BACK=back,
        WIDE=tl.float64 if q_BSHE.dtype == torch.float64 else tl.float32,
        HEADS=triton.next_power_of_2(max(heads, k_BSGE.shape[2])),
        HALF=triton.next_power_of_2(rotated // 2),
        KEPT=triton.next_power_of_2(max(features - rotated, 1)),
    )
    return outputs[0], outputs[1]


@triton.jit
def rotate_rows(
    q_ptr,
    k_ptr,
    new_q_ptr,
    new_k_ptr,
    cos_ptr,
    sin_ptr,
    length,
    q_heads,
    k_heads,
    features,
    half,
    q_batch,
    q_position,
    q_head,
    k_batch,
    k_position,
    k_head,
    ONE_TABLE: tl.constexpr,
    BACK: tl.constexpr,
    WIDE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Rotates all heads of q and k at one position of one sequence; BACK: by the negative angle.

    q: [batch, length, q_heads, features], k: the same with k_heads; strides of their own, features contiguous.
    new_q, new_k: contiguous.
    cos, sin: [batch or 1 (ONE_TABLE), length, 1, 2 half] contiguous. Math in WIDE.
    Reference: megatron/kernels/rotary/backends/reference.py
    Tested in: tests/unit/kernels/test_rotary.py (outputs and gradients)
    """
    program = tl.program_id(0).to(tl.int64)
    batch = program // length
    position = program % length
    angle_row = position if ONE_TABLE else program
    pair = tl.arange(0, HALF)
    is_pair = pair < half
    cos = tl.load(cos_ptr + angle_row * 2 * half + pair, mask=is_pair, other=0.0).to(WIDE)[None, :]
    sin = tl.load(sin_ptr + angle_row * 2 * half + pair, mask=is_pair, other=0.0).to(WIDE)[None, :]
    if BACK:
        sin = -sin
    head = tl.arange(0, HEADS)[:, None]
    kept = 2 * half + tl.arange(0, KEPT)[None, :]
    pairs, is_kept = (head < q_heads) & is_pair[None, :], (head < q_heads) & (kept < features)
    q_rows = q_ptr + batch * q_batch + position * q_position + head * q_head
    new_q_rows = new_q_ptr + (program * q_heads + head) * features
    rotate_heads(q_rows, new_q_rows, cos, sin, pair[None, :], half, pairs, kept, is_kept, WIDE)
    pairs, is_kept = (head < k_heads) & is_pair[None, :], (head < k_heads) & (kept < features)
    k_rows = k_ptr + batch * k_batch + position * k_position + head * k_head
    new_k_rows = new_k_ptr + (program * k_heads + head) * features
    rotate_heads(k_rows, new_k_rows, cos, sin, pair[None, :], half, pairs, kept, is_kept, WIDE)


@triton.jit
def rotate_heads(x_rows, new_rows, cos, sin, pair, half, pairs, kept, is_kept, WIDE: tl.constexpr):
    """Rotates the pairs (i, i + half) of each head, and copies the features beyond them."""
    first = tl.load(x_rows + pair, mask=pairs, other=0.0)
    second = tl.load(x_rows + pair + half, mask=pairs, other=0.0)
    turned = first.to(WIDE) * cos - second.to(WIDE) * sin
    other = second.to(WIDE) * cos + first.to(WIDE) * sin
    tl.store(new_rows + pair, turned.to(first.dtype), mask=pairs)
    tl.store(new_rows + pair + half, other.to(first.dtype), mask=pairs)
    tl.store(new_rows + kept, tl.load(x_rows + kept, mask=is_kept, other=0.0), mask=is_kept)
