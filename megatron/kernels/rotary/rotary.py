"""Rotation of queries and keys by their positions (Su et al. 2021, arXiv:2104.09864).

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron.kernels.backends import Operation

Rotation = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q [B, S, H, E], k [B, S, G, E], cos, sin [B or 1, S, 1, r]) -> q and k whose features (i, i + r/2), i < r/2, are
rotated as the pairs of GPT-NeoX are; features from r on are as they were. cos and sin are float32 and repeat after r/2.
The rotation is computed in float32 (float64 for float64), and keeps the dtype of q and k."""

ROTARY: Operation[Rotation] = Operation("rotary", package="megatron.kernels.rotary.backends", key="rotary")
