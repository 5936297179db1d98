"""Optional packages and compilers that make the same arithmetic faster. The default needs none of them."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from megatron.config.section import Key, OneOf, Section
from megatron.registry import variant_names

Switch = Literal["auto", "on", "off"]


def _backends(operation: str) -> list[str]:
    return ["auto", *variant_names(f"megatron.kernels.{operation}.backends")]


class SpeedupsConfig(Section):
    """Switches are `auto` (used where it is installed and fits), `on` (an error where it is not) or `off`. Other keys
    name an implementation, which is an error where it cannot run; `auto` takes the fastest that can."""

    pattention: Annotated[str, OneOf(partial(_backends, "pattention")), Key(difference="not a NeoX key")] = "auto"
    """How Pattention is computed. Triton: kernels that read the scores once forward and once backward; auto takes them
    on a GPU. Eager: torch's own operations, which auto takes elsewhere. Compile: the same under torch.compile, whose
    first step takes a minute. Reference: the definition, for comparison, without tensor parallelism."""

    rotary: Annotated[str, OneOf(partial(_backends, "rotary")), Key(difference="not a NeoX key")] = "auto"
    """How rotary positions are applied. Triton: queries and keys in one kernel; auto takes it on a GPU. Eager: torch's
    own operations. Reference: the definition, for comparison."""

    fused_cross_entropy: Annotated[Switch, Key(difference="not a NeoX key")] = "auto"
    """Head and loss in one, over a few rows at a time, so that a micro batch's logits are never held at once. Auto uses
    it on a GPU; on a CPU the numbers differ in their last digits from those of earlier runs."""

    flash_attention: Annotated[Switch, Key(difference="not a NeoX key")] = "auto"
    """flash-attn's kernels in place of torch's own (SDPA). Auto uses them on a GPU in bf16 or fp16."""

    apex_fused_adam: Annotated[Switch, Key(difference="not a NeoX key")] = "auto"
    """apex's FusedAdam in place of torch's AdamW. Auto uses it on a GPU."""

    apex_fused_layernorm: Annotated[Switch, Key(difference="not a NeoX key")] = "auto"
    """apex's FusedLayerNorm in place of torch's. Auto uses it on a GPU."""

    torch_fused_adamw: Annotated[Switch, Key(difference="not a NeoX key")] = "auto"
    """torch's single-kernel AdamW. Auto uses it on a GPU unless apex's is used. On a CPU it takes a third of the time,
    and its numbers differ in their last digits from those of earlier runs."""

    torch_compile: Annotated[Switch, Key(difference="not a NeoX key")] = "auto"
    """torch.compile of each transformer layer. Auto does not: the first step of every run would take minutes."""
