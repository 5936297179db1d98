"""Which optional speed-ups a run uses, and their place in the layers.

Layers are built with torch's own functions. What is chosen here replaces some of them by the same function from an
optional package, or compiles the layers; no weight and no name changes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

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
    """What was chosen."""

    attention: Literal["torch SDPA", "flash-attn"]
    layernorm: Literal["torch", "apex"]
    optimizer: Literal["torch AdamW", "torch fused AdamW", "apex FusedAdam"]
    compile: bool

    def __str__(self) -> str:
        compiled = "torch.compile" if self.compile else "not compiled"
        return f"attention {self.attention} | layer norm {self.layernorm} | optimizer {self.optimizer} | {compiled}"


def choose_speedups(config: SpeedupsConfig, precision: PrecisionConfig, *, on_gpu: bool) -> Speedups:
    """Decide every `auto`. Raises EnvironmentSetupError for an `on` that this machine or number format cannot have."""
    half = precision.dtype != "fp32"
    if config.flash_attention == "on" and not half:
        raise EnvironmentSetupError(
            "flash_attention: on: flash-attn computes in bf16 and fp16 only, and this run is in fp32. Set `precision: "
            "bfloat16`, or the key to auto or off."
        )
    flash = _use("flash_attention", config.flash_attention, "flash_attn", on_gpu=on_gpu) and half
    apex_norm = _use("apex_fused_layernorm", config.apex_fused_layernorm, "apex", on_gpu=on_gpu)
    apex_adam = config.torch_fused_adamw != "on" and _use(
        "apex_fused_adam", config.apex_fused_adam, "apex", on_gpu=on_gpu
    )
    torch_adam = config.torch_fused_adamw == "on" or (config.torch_fused_adamw == "auto" and on_gpu)
    if config.torch_compile == "on":
        _require_compiler(on_gpu)
    return Speedups(
        attention="flash-attn" if flash else "torch SDPA",
        layernorm="apex" if apex_norm else "torch",
        optimizer="apex FusedAdam" if apex_adam else "torch fused AdamW" if torch_adam else "torch AdamW",
        compile=config.torch_compile == "on",
    )


def _use(key: str, switch: Switch, package: str, *, on_gpu: bool) -> bool:
    if switch == "on":
        if not is_installed(package):
            raise EnvironmentSetupError(f"{key}: on: the package {package!r} is not installed. {INSTALL}")
        if not on_gpu:
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
    """Put what was chosen into every layer of `module` that has a place for it."""
    for layer in module.modules():
        if speedups.attention == "flash-attn" and isinstance(layer, SelfAttention):
            layer.core_attention = flash_attention()
        if speedups.layernorm == "apex" and isinstance(layer, LayerNorm | NonParametricLayerNorm):
            layer.normalize = apex_layer_norm()
        if speedups.compile and isinstance(layer, TransformerLayer):
            layer.compile()


def apex_layer_norm() -> LayerNormFunction:
    """apex's fused layer norm with the signature of torch.nn.functional.layer_norm."""
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
