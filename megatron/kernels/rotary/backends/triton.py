"""Rotary positions by a kernel of Triton, on GPUs."""

from __future__ import annotations

from megatron.kernels.backends import Backend
from megatron.kernels.rotary.rotary import ROTARY, Rotation
from megatron.kernels.triton_runtime import triton_obstacle


def load() -> Rotation:
    """Imports Triton."""
    from megatron.kernels.rotary.triton_rotation import rotate

    return rotate


ROTARY.register("triton")(
    Backend(label="triton", rank=1, package="triton", gpu="preferred", own_obstacle=triton_obstacle, load=load)
)
