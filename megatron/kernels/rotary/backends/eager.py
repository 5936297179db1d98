"""Rotary positions by torch's own operations: runs everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.backends import Backend
from megatron.kernels.rotary.rotary import ROTARY


def rotate(q_BSHE: Tensor, k_BSGE: Tensor, cos_BS1r: Tensor, sin_BS1r: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries [B, S, H, E] and keys [B, S, G, E]."""
    return _rotate(q_BSHE, cos_BS1r, sin_BS1r), _rotate(k_BSGE, cos_BS1r, sin_BS1r)


def _rotate(x_BSHE: Tensor, cos_BS1r: Tensor, sin_BS1r: Tensor) -> Tensor:
    rotated, kept = x_BSHE.tensor_split([cos_BS1r.shape[-1]], dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    turned = rotated * cos_BS1r + torch.cat((-second, first), dim=-1) * sin_BS1r
    return torch.cat((turned.to(x_BSHE.dtype), kept), dim=-1)


ROTARY.register("eager")(Backend(label="eager", rank=0, load=lambda: rotate))
