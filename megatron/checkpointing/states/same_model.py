"""Comparison of a checkpoint's model with the configured one: do its weights mean the same there?"""

from __future__ import annotations

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.sections.growth import ModelSizes
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.run_config import RunConfig
from megatron.errors import CheckpointError
from megatron.model.causal_lm import VocabSize

FREE_MODEL_FIELDS = frozenset(
    {"seq_length", "max_position_embeddings", "attention_dropout", "hidden_dropout", "init_method",
     "output_layer_init_method", "init_method_std", "make_vocab_size_divisible_by", "padded_vocab_size"}
)  # fmt: skip
"""What may differ between a checkpoint's model and the configured one: none of it changes what weights mean."""


def free_model_fields(model: ModelConfig) -> frozenset[str]:
    """Returns what may differ from `model`: the number of positions only where none is learned."""
    return FREE_MODEL_FIELDS - ({"max_position_embeddings"} if model.pos_emb == "learned" else set())


def model_differences(checkpoint: ModelConfig, configured: ModelConfig) -> list[str]:
    """Lists the differences that matter, one sentence each."""
    theirs, ours = checkpoint.model_dump(), configured.model_dump()
    free = free_model_fields(configured)
    return [
        f"{name}: checkpoint {theirs[name]}, configuration {ours[name]}"
        for name in ours
        if name not in free and ours[name] != theirs[name]
    ]


def described_model(config: RunConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Returns the model that a configuration describes for the step of a checkpoint of its run.

    That is the configuration's own until the growth of its section `grow`, and the larger one afterwards, with the
    sizes that the checkpoint records.
    """
    grow, grown = config.grow, checkpoint.state.growth
    if grow is None or not grow.happens_in_training or not grown:
        return config.model
    before, after = grown[-1].before, grown[-1].after.model_dump()
    asked = {name: size for name, size in grow.sizes.items() if name in after and size is not None}
    if before != ModelSizes.of(config.model) or any(after[name] != size for name, size in asked.items()):
        return config.model
    theirs = checkpoint.config.model
    return config.model.model_copy(update={"num_layers": theirs.num_layers, "param_tokens": theirs.param_tokens})


def require_same_vocabulary(checkpoint: Checkpoint, vocab: VocabSize, *, padding_is_masked: bool) -> None:
    """Raises CheckpointError when the checkpoint's embedding has another number of rows than `vocab`.

    A difference in the padding alone is allowed where padding takes no part in the softmax.
    """
    state = checkpoint.state
    if state.padded_vocab_size == vocab.padded:
        return
    same_tokens = state.vocab_size == vocab.actual
    if same_tokens and padding_is_masked:
        return
    masked = ". With `mask_padded_vocab: true` from a run's start, its padding could be changed" if same_tokens else ""
    raise CheckpointError(
        f"{checkpoint.path} has a vocabulary of {state.vocab_size} tokens padded to {state.padded_vocab_size}, "
        f"this run one of {vocab.actual} padded to {vocab.padded}. Use the tokenizer that the checkpoint was trained "
        f"with (`vocab_file`, `tokenizer_type`), or set `padded_vocab_size: {state.padded_vocab_size}`{masked}."
    )
