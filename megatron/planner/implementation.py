"""The implementations that a run will use, as far as its memory and time depend on them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.optimizer import facts_of
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.speedups import Switch

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of an element of weights and activations."""


@dataclass(frozen=True)
class Implementation:
    """Choices of the section `speedups` with every `auto` decided, as on a machine that has what it asks for."""

    on_gpu: bool
    pattention: str
    rotary: str
    fused_cross_entropy: bool
    fused_optimizer: bool
    """Whether the optimizer's step is one kernel, which holds nothing for itself."""
    moments: int
    """Tensors of a parameter's shape in the optimizer's state."""

    def __str__(self) -> str:
        loss = "loss in chunks" if self.fused_cross_entropy else "loss of whole logits"
        optimizer = "fused optimizer" if self.fused_optimizer else "optimizer of plain operations"
        return f"Pattention {self.pattention}, rotary {self.rotary}, {loss}, {optimizer}"


def implementation_of(run: RunConfig, *, on_gpu: bool) -> Implementation:
    """Decides what `auto` takes on a GPU with its packages, or on a CPU."""
    speedups = run.speedups
    automatic = "triton" if on_gpu else "eager"
    facts = facts_of(run.training.optimizer)
    switches: list[Switch] = [
        "auto" if not one.switch else getattr(speedups, one.switch) for one in facts.implementations.values()
    ]
    return Implementation(
        on_gpu,
        pattention=automatic if speedups.pattention == "auto" else speedups.pattention,
        rotary=automatic if speedups.rotary == "auto" else speedups.rotary,
        fused_cross_entropy=_is_on(speedups.fused_cross_entropy, on_gpu) and run.distillation is None,
        # The first is the reference, of plain operations.
        fused_optimizer=any(_is_on(switch, on_gpu) for switch in switches[1:]),
        # Muon's hidden matrices have one, of which so much is not made: room for two is planned.
        moments=max(len(facts.moments if group.moments is None else group.moments) for group in facts.groups),
    )


def _is_on(switch: Switch, on_gpu: bool) -> bool:
    return switch == "on" or (switch == "auto" and on_gpu)
