"""Pattention by Triton's kernels: one pass over the scores forward and one backward, on GPUs.

Where Triton's interpreter is on (TRITON_INTERPRET=1), they run on CPUs too, thousands of times slower: for tests.
"""

from __future__ import annotations

from megatron.kernels.backends import Backend, Machine
from megatron.kernels.pattention.closed_form import closed_form_pattention
from megatron.kernels.pattention.pattention import PATTENTION, PattentionFunction
from megatron.kernels.triton_runtime import triton_obstacle
from megatron.registry import variant_names


def obstacle(machine: Machine) -> str | None:
    """Returns why these kernels cannot run there; None when they can."""
    thetas = variant_names("megatron.kernels.pattention.triton_thetas")
    if machine.theta is not None and machine.theta not in thetas:
        return (
            f"norm_activation_type {machine.theta!r} has no formulas in Triton, only {', '.join(thetas)} have. Use "
            "eager or compile."
        )
    return triton_obstacle(machine)


def load() -> PattentionFunction:
    """Imports Triton."""
    from megatron.kernels.pattention.triton_passes import TritonPasses

    return closed_form_pattention(TritonPasses)


PATTENTION.register("triton")(
    Backend(label="triton", rank=1, package="triton", gpu="preferred", own_obstacle=obstacle, load=load)
)
