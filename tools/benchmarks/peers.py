"""Peers of a TokenFormer in a benchmark: the published operations, and a Transformer of as many parameters."""

from __future__ import annotations

from megatron.config.command_line import CommandLine
from megatron.config.load_config import LoadedConfig, load_config
from megatron.config.model_size import count_parameters
from megatron.config.sections.model import ModelConfig
from megatron.data.tokenizer import padded_vocab_size
from megatron.errors import ConfigError

TRANSFORMER = "Transformer"
PUBLISHED = "published operations"
RECOMPUTING = "published, recomputing"
PEERS = ("engine", PUBLISHED, RECOMPUTING, f"{TRANSFORMER}, engine", f"{TRANSFORMER}, transformers")
"""Names of the contenders (contenders.py)."""
COMPILED = ("engine, compiled", "published, compiled")
"""Names of those whose layers torch.compile compiles."""
AS_COMPILED = "torch_compile=on"
"""Override that compiles the engine's layers."""
AS_TRANSFORMER = (
    "architecture=gpt_neox",
    "norm=layernorm",
    *(f"{part}_slot_num=null" for part in ("qkv", "proj", "ffn")),
    *(f"{part}_scale_base=null" for part in ("qkv", "proj", "ffn")),
    *(f"{key}=null" for key in ("norm_activation_type", "pattention", "recompute_scores")),
)
"""Overrides that make a GPT-NeoX Transformer of a TokenFormer's configuration."""


def require_tokenformer(model: ModelConfig) -> None:
    """Raises ConfigError for a model that is no TokenFormer, or one whose scale is not that of its tokens."""
    tokens = model.param_tokens
    if tokens is None:
        raise ConfigError(f"architecture {model.architecture}: --peers times a TokenFormer beside its peers.")
    sizes = (tokens.qkv, tokens.proj, tokens.ffn)
    if sizes != (tokens.qkv_scale_base, tokens.proj_scale_base, tokens.ffn_scale_base):
        raise ConfigError("scale_base: the published operations scale by the number of tokens. Leave the keys out.")


def equal_transformer(command: CommandLine, vocab_size: int) -> LoadedConfig:
    """Returns the configuration of a GPT-NeoX Transformer of the same width with as many layers as make its size equal.

    At equal parameters the products with weights have equal FLOPs; the Transformer has more layers, and so more
    attention. `vocab_size` counts ids of the tokenizer.
    """
    ours = load_config(command.files, command.overrides).run.model

    def of_layers(number: int) -> LoadedConfig:
        return load_config(command.files, [*command.overrides, *AS_TRANSFORMER, f"num_layers={number}"])

    def size(model: ModelConfig) -> int:
        return count_parameters(model, padded_vocab_size(model, vocab_size))

    one, two = (size(of_layers(number).run.model) for number in (1, 2))
    return of_layers(max(1, 1 + round((size(ours) - one) / (two - one))))
