"""Pattention whose passes over the scores torch.compile makes into one kernel each, on GPUs and on CPUs."""

from __future__ import annotations

from megatron.kernels.backends import Backend
from megatron.kernels.compiler import compiler_obstacle
from megatron.kernels.pattention.closed_form import closed_form_pattention
from megatron.kernels.pattention.pattention import PATTENTION, PattentionFunction


def load() -> PattentionFunction:
    """Imports torch's compiler."""
    from megatron.kernels.pattention.compiled_passes import CompiledPasses

    return closed_form_pattention(CompiledPasses)


PATTENTION.register("compile")(
    Backend(
        label="compile",
        rank=-1,  # never auto's: the first step would take a minute
        own_obstacle=lambda machine: compiler_obstacle(machine.on_gpu),
        load=load,
    )
)
