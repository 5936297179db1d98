"""TokenFormer (Wang et al. 2024, arXiv:2410.23168): every projection, and the MLP, is a Pattention."""

from __future__ import annotations

from megatron.config.architecture import ARCHITECTURES, ArchitectureFacts, FixedValue
from megatron.config.sections.model import ModelConfig, ParamTokenConfig


def param_tokens(model: ModelConfig) -> ParamTokenConfig:
    """Returns the section of parameter tokens, which validation requires of a TokenFormer.

    Raises ValueError for a model that was put together without it.
    """
    if model.param_tokens is None:
        raise ValueError(f"architecture {model.architecture} needs model.param_tokens")
    return model.param_tokens


def layer_matrices(model: ModelConfig) -> int:
    """Counts 2 D (3 n_qkv + n_proj + n_ffn) weights: each parameter token is a key and a value (table 3)."""
    tokens = param_tokens(model)
    return 2 * model.hidden_size * (3 * tokens.qkv + tokens.proj + tokens.ffn)


_NOT_HERE = "belongs to gpt_neox: a TokenFormer has no"
_NO_BIASES = FixedValue(False, f"{_NOT_HERE} biases; use false")

ARCHITECTURES.register("tokenformer")(
    ArchitectureFacts(
        layer_matrices,
        layer_biases=lambda model: 0,
        attention_types=("tokenformer",),
        output_weights=("attention.proj.value_tokens", "mlp.value_tokens"),
        split_sizes=("param_tokens.qkv", "param_tokens.proj", "param_tokens.ffn"),
        defaults={"use_bias_in_attn_linear": False, "use_bias_in_mlp": False},
        fixed={
            "use_bias_in_attn_linear": _NO_BIASES,
            "use_bias_in_mlp": _NO_BIASES,
            "activation": FixedValue("gelu", f"{_NOT_HERE} MLP activation; norm_activation_type normalizes its scores"),
            "parallel_residual": FixedValue(False, "the published TokenFormer layer is sequential; use false"),
        },
        sections={"param_tokens": "parameter tokens"},
    )
)
