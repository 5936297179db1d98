"""Chooses the optional speed-ups of a run, and puts them into the layers.

Layers are built with torch's own functions. What is chosen here replaces some of them by the same function from an
optional package, or compiles the layers; no weight and no name changes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from megatron.config.optimizer import OptimizerConfig, OptimizerFacts, facts_of
from megatron.config.sections.speedups import SpeedupsConfig, Switch
from megatron.config.sections.training import PrecisionConfig
from megatron.errors import EnvironmentSetupError
from megatron.kernels.attention.op import flash_attention
from megatron.model.attention import SelfAttention
from megatron.model.layer import TransformerLayer
from megatron.model.norms import LayerNorm, LayerNormFunction, NonParametricLayerNorm
from megatron.registry import is_installed, require

INSTALL = "Install it with `pip install -r requirements/gpu.txt`, or set the key to auto or off."


@dataclass(frozen=True)
class Speedups:
    """The choices, by the names that a run's log shows."""

    attention: Literal["torch SDPA", "flash-attn"]
    layernorm: Literal["torch", "apex"]
    optimizer: str
    """Name of one of the implementations that the optimizer's facts declare."""
    compile: bool

    def __str__(self) -> str:
        compiled = "torch.compile" if self.compile else "not compiled"
        return f"attention {self.attention} | layer norm {self.layernorm} | optimizer {self.optimizer} | {compiled}"


def choose_speedups(
    config: SpeedupsConfig, precision: PrecisionConfig, optimizer: OptimizerConfig, *, on_gpu: bool
) -> Speedups:
    """Decides every `auto`. Raises EnvironmentSetupError for an `on` that this machine or number format cannot have."""
    half = precision.dtype != "fp32"
    if config.flash_attention == "on" and not half:
        raise EnvironmentSetupError(
            "flash_attention: on: flash-attn computes in bf16 and fp16 only, and this run is in fp32. Set `precision: "
            "bfloat16`, or the key to auto or off."
        )
    flash = _use("flash_attention", config.flash_attention, "flash_attn", on_gpu=on_gpu) and half
    apex_norm = _use("apex_fused_layernorm", config.apex_fused_layernorm, "apex", on_gpu=on_gpu)
    if config.torch_compile == "on":
        _require_compiler(on_gpu)
    return Speedups(
        attention="flash-attn" if flash else "torch SDPA",
        layernorm="apex" if apex_norm else "torch",
        optimizer=_choose_implementation(config, facts_of(optimizer), on_gpu=on_gpu),
        compile=config.torch_compile == "on",
    )


def _choose_implementation(config: SpeedupsConfig, facts: OptimizerFacts[Any], *, on_gpu: bool) -> str:
    """Returns the implementation that is switched on, else the first that this machine has, else the reference."""
    reference, *faster = facts.implementations

    def switch_of(name: str) -> Switch:
        key = facts.implementations[name].switch
        switch: Switch = "auto" if key is None else getattr(config, key)
        return switch

    for name in sorted(faster, key=lambda name: switch_of(name) != "on"):
        one = facts.implementations[name]
        if _use(one.switch or name, switch_of(name), one.package, on_gpu=on_gpu, runs_on_cpu=one.runs_on_cpu):
            return name
    return reference


def _use(key: str, switch: Switch, package: str, *, on_gpu: bool, runs_on_cpu: bool = False) -> bool:
    if switch == "on":
        if not is_installed(package):
            raise EnvironmentSetupError(f"{key}: on: the package {package!r} is not installed. {INSTALL}")
        if not (on_gpu or runs_on_cpu):
            raise EnvironmentSetupError(
                f"{key}: on: {package} needs a GPU, and torch sees none. Set it to auto or off."
            )
    return switch == "on" or (switch == "auto" and on_gpu and is_installed(package))


def _require_compiler(on_gpu: bool) -> None:
    if on_gpu and not is_installed("triton"):
        raise EnvironmentSetupError(f"torch_compile: on: the package 'triton' is not installed. {INSTALL}")
    compiler = os.environ.get("CXX", "g++")
    if not on_gpu and shutil.which(compiler) is None:
        raise EnvironmentSetupError(
            f"torch_compile: on: torch compiles for the CPU with a C++ compiler, and there is no {compiler!r}. Install "
            "one, name it in the environment variable CXX, or set the key to auto or off."
        )


def apply_speedups(module: nn.Module, speedups: Speedups) -> None:
    """Puts the chosen functions into every layer of `module` that has a place for them."""
    for layer in module.modules():
        if speedups.attention == "flash-attn" and isinstance(layer, SelfAttention):
            layer.core_attention = flash_attention()
        if speedups.layernorm == "apex" and isinstance(layer, LayerNorm | NonParametricLayerNorm):
            layer.normalize = apex_layer_norm()
        if speedups.compile and isinstance(layer, TransformerLayer):
            layer.compile()


def apex_layer_norm() -> LayerNormFunction:
    """Returns apex's fused layer norm with the signature of torch.nn.functional.layer_norm."""
    apex = require("apex.normalization.fused_layer_norm", "apex_fused_layernorm: on", INSTALL)

    def normalize(
        x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, epsilon: float
    ) -> Tensor:
        if weight is None:
            plain: Tensor = apex.fused_layer_norm(x, shape, epsilon)
            return plain
        affine: Tensor = apex.fused_layer_norm_affine(x, weight, bias, shape, epsilon)
        return affine

    return normalize
