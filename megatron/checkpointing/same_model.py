"""Whether a checkpoint's weights mean the same in a configured model."""

from __future__ import annotations

from megatron.config.model import ModelConfig

FREE_MODEL_FIELDS = frozenset(
    {"seq_length", "max_position_embeddings", "attention_dropout", "hidden_dropout", "init_method",
     "output_layer_init_method", "init_method_std", "make_vocab_size_divisible_by", "padded_vocab_size"}
)  # fmt: skip
"""What may differ between a checkpoint's model and the configured one: none of it changes what weights mean."""


def model_differences(checkpoint: ModelConfig, configured: ModelConfig) -> list[str]:
    """What differs and matters, one sentence each."""
    theirs, ours = checkpoint.model_dump(), configured.model_dump()
    return [
        f"{name}: checkpoint {theirs[name]}, configuration {ours[name]}"
        for name in ours
        if name not in FREE_MODEL_FIELDS and ours[name] != theirs[name]
    ]
