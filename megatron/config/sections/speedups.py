"""Optional packages and compilers that make the same arithmetic faster. The default needs none of them."""

from __future__ import annotations

from typing import Annotated, Literal

from megatron.config.section import Key, Section

Switch = Literal["auto", "on", "off"]


class SpeedupsConfig(Section):
    """Each is `auto` (used where it is installed and fits), `on` (an error where it is not) or `off`."""

    flash_attention: Annotated[Switch, Key(difference="not a NeoX key")] = "auto"
    """flash-attn's kernels in place of torch's own (SDPA). Auto uses them on a GPU in bf16 or fp16."""

    apex_fused_adam: Annotated[Switch, Key(difference="not a NeoX key")] = "auto"
    """apex's FusedAdam in place of torch's AdamW. Auto uses it on a GPU."""

    apex_fused_layernorm: Annotated[Switch, Key(difference="not a NeoX key")] = "auto"
    """apex's FusedLayerNorm in place of torch's. Auto uses it on a GPU."""

    torch_fused_adamw: Annotated[Switch, Key(difference="not a NeoX key")] = "auto"
    """torch's single-kernel AdamW. Auto uses it on a GPU unless apex's is used."""

    torch_compile: Annotated[Switch, Key(difference="not a NeoX key")] = "auto"
    """torch.compile of each transformer layer. Auto does not: the first step of every run would take minutes."""
