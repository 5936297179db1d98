"""Causal attention by the flash-attn package (Dao 2023, arXiv:2307.08691): on NVIDIA GPUs, in bf16 or fp16."""

from __future__ import annotations

from torch import Tensor

from megatron.kernels.attention.causal_attention import CAUSAL_ATTENTION, CausalAttention
from megatron.kernels.backends import Backend
from megatron.registry import require


def load() -> CausalAttention:
    """Imports flash-attn. Raises EnvironmentSetupError when it is not installed."""
    flash_attn = require("flash_attn", "flash_attention: on", "Install it with `pip install -r requirements/gpu.txt`.")

    def causal_attention(
        q_BSHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, dropout: float = 0.0, scale: float | None = None
    ) -> Tensor:
        output_BSHE: Tensor = flash_attn.flash_attn_func(
            q_BSHE, k_BSGE, v_BSGE, dropout_p=dropout, softmax_scale=scale, causal=True
        )
        return output_BSHE

    return causal_attention


CAUSAL_ATTENTION.register("flash_attn")(
    Backend(
        label="flash-attn",
        rank=1,
        key="flash_attention",
        package="flash_attn",
        gpu="required",
        dtypes=("bf16", "fp16"),
        load=load,
    )
)
