"""A checkpoint's weights under their global names, without optimizer state and without DeepSpeed's engine."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpointing.folder import Checkpoint
from megatron.checkpointing.safe_files import load_tensors
from megatron.errors import CheckpointError
from megatron.model.causal_lm import LocalCausalLM, VocabSize, build_local, layer_names


def layer_file(folder: Path, layer: int, tensor_rank: int) -> Path:
    """Where DeepSpeed keeps one pipeline layer's weights for one tensor-parallel rank."""
    return folder / f"layer_{layer:02d}-model_{tensor_rank:02d}-model_states.pt"


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every weight of the model by global name, memory-mapped, in the format in which it was trained.

    Raises CheckpointError when a file is missing or damaged, or the weights are split over tensor-parallel ranks.
    """
    if checkpoint.state.tensor_parallel_size > 1:
        raise CheckpointError(
            f"{checkpoint.path} is split over {checkpoint.state.tensor_parallel_size} tensor-parallel ranks, and only "
            "unsplit checkpoints can be read here."
        )
    weights: dict[str, Tensor] = {}
    model = checkpoint.config.model
    names = layer_names(model)
    own_layers = names[:-1] if model.tie_embeddings else names
    for layer, name in enumerate(own_layers):
        tensors = load_tensors(layer_file(checkpoint.path, layer, tensor_rank=0))
        weights |= {f"{name}.{local}": tensor for local, tensor in tensors.items()}
    return weights


def load_local_model(checkpoint: Checkpoint, device: torch.device) -> LocalCausalLM:
    """The trained model on `device`, in evaluation mode.

    Raises CheckpointError when weights are missing or left over.
    """
    vocab = VocabSize(checkpoint.state.vocab_size, checkpoint.state.padded_vocab_size)
    with torch.device("meta"):
        model = build_local(checkpoint.config.model, vocab, seed=None)
    try:
        model.load_state_dict(read_weights(checkpoint), strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.path}: its weights are not those of its configuration: {error}") from error
    return model.to(device).eval()
