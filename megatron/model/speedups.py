"""Chooses a run's optional speed-ups, and puts them into the layers.

Layers are built with kernels that run everywhere. A speed-up replaces one by another backend of the same operation, or
compiles the layers; no weight and no name changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from megatron.config.optimizer import OptimizerConfig, facts_of
from megatron.config.sections.speedups import SpeedupsConfig
from megatron.config.sections.training import PrecisionConfig
from megatron.errors import EnvironmentSetupError
from megatron.kernels.attention.causal_attention import CAUSAL_ATTENTION
from megatron.kernels.backends import Backend, Candidate, Machine, Operation, choose
from megatron.kernels.compiler import compiler_obstacle
from megatron.kernels.layer_norm.layer_norm import LAYER_NORM
from megatron.kernels.pattention.pattention import PATTENTION
from megatron.kernels.rotary.rotary import ROTARY
from megatron.model.attention import SelfAttention
from megatron.model.layer import TransformerLayer
from megatron.model.norms import LayerNorm, NonParametricLayerNorm
from megatron.model.pattention import Pattention
from megatron.model.positions import RotaryEmbedding


@dataclass(frozen=True)
class KernelSlot:
    """The place of an operation in the model: modules that call it, and the attribute that holds its backend."""

    operation: Operation[Any]
    modules: tuple[type[nn.Module], ...]
    attribute: str


SLOTS = (
    KernelSlot(CAUSAL_ATTENTION, (SelfAttention,), "core_attention"),
    KernelSlot(PATTENTION, (Pattention,), "kernel"),
    KernelSlot(ROTARY, (RotaryEmbedding,), "rotate"),
    KernelSlot(LAYER_NORM, (LayerNorm, NonParametricLayerNorm), "normalize"),
)
FUSED = "head and loss in chunks"
LOSSES = (
    Candidate(label="loss of whole logits", rank=0),
    Candidate(label=FUSED, rank=1, key="fused_cross_entropy", gpu="preferred"),
)


@dataclass(frozen=True)
class Speedups:
    """The speed-ups of a run."""

    kernels: Mapping[str, Backend[Any]]
    """Backend of each operation, by the operation's name."""
    optimizer: str
    """Name of one of the implementations that the optimizer declares (megatron/config/optimizers)."""
    compile: bool
    fused_cross_entropy: bool = False
    missed: tuple[str, ...] = ()
    """A line for each faster backend that `auto` would have taken, but for something that is missing."""

    def __str__(self) -> str:
        chosen = [slot.operation.kind for slot in SLOTS if slot.operation.has_choice()]
        kernels = [f"{operation} {self.kernels[operation].label}" for operation in chosen]
        loss = FUSED if self.fused_cross_entropy else "loss of whole logits"
        compiled = "torch.compile" if self.compile else "not compiled"
        return " | ".join([*kernels, loss, f"optimizer {self.optimizer}", compiled])


def choose_speedups(
    config: SpeedupsConfig,
    precision: PrecisionConfig,
    optimizer: OptimizerConfig,
    *,
    on_gpu: bool,
    theta: str | None = None,
) -> Speedups:
    """Decides every `auto`. `theta` normalizes the scores of the model's Pattentions, if it has any.

    Raises EnvironmentSetupError for an `on` that this machine or number format cannot have.
    """
    machine = Machine(on_gpu, precision.dtype, theta)
    kernels = {slot.operation.kind: slot.operation.choose(config, machine) for slot in SLOTS}
    implementations = [
        Candidate(label=name, rank=rank, key=one.switch, package=one.package, gpu=one.gpu)
        for rank, (name, one) in enumerate(facts_of(optimizer).implementations.items())
    ]
    implementation = choose(implementations, config, machine).label
    obstacle = compiler_obstacle(on_gpu) if config.torch_compile == "on" else None
    if obstacle is not None:
        raise EnvironmentSetupError(f"torch_compile: on: {obstacle}")
    missed = (slot.operation.missed(config, machine) for slot in SLOTS)
    return Speedups(
        kernels,
        implementation,
        compile=config.torch_compile == "on",
        fused_cross_entropy=choose(LOSSES, config, machine).label == FUSED,
        missed=tuple(line for line in missed if line is not None),
    )


def apply_speedups(model: nn.Module, speedups: Speedups) -> None:
    """Puts the chosen kernels into every module of `model` that has a place for them, and compiles its layers."""
    functions = {operation: backend.load() for operation, backend in speedups.kernels.items()}
    for module in model.modules():
        for slot in SLOTS:
            if isinstance(module, slot.modules):
                setattr(module, slot.attribute, functions[slot.operation.kind])
        if speedups.compile and isinstance(module, TransformerLayer):
            module.compile()
