"""Rotary positions as products with complex numbers, as their authors write them, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.backends import Backend
from megatron.kernels.rotary.rotary import ROTARY


def rotate_reference(x_BSHE: Tensor, cos_BS1r: Tensor, sin_BS1r: Tensor) -> Tensor:
    """Multiplies x_i + j x_{i + r/2} by cos_i + j sin_i, for i < r/2."""
    half = cos_BS1r.shape[-1] // 2
    wide = x_BSHE.to(torch.promote_types(x_BSHE.dtype, torch.float32))
    pairs = torch.complex(wide[..., :half], wide[..., half : 2 * half])
    angles = torch.complex(cos_BS1r[..., :half], sin_BS1r[..., :half])
    turned = pairs * angles.to(pairs.dtype)
    return torch.cat((turned.real, turned.imag, wide[..., 2 * half :]), dim=-1).to(x_BSHE.dtype)


def rotate(q_BSHE: Tensor, k_BSGE: Tensor, cos_BS1r: Tensor, sin_BS1r: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries [B, S, H, E] and keys [B, S, G, E]."""
    return rotate_reference(q_BSHE, cos_BS1r, sin_BS1r), rotate_reference(k_BSGE, cos_BS1r, sin_BS1r)


ROTARY.register("reference")(Backend(label="reference", rank=None, load=lambda: rotate))
