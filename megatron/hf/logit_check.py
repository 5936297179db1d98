"""Holds an exported folder, as transformers loads it, against the model that it was made from."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron.errors import CheckpointError

TOLERANCE = 1e-5
NUM_SEQUENCES, MAX_LENGTH = 2, 128


def fixed_tokens(vocab_size: int, max_length: int) -> Tensor:
    """Returns the token ids [B, S] that every check of a vocabulary of this size uses."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (NUM_SEQUENCES, min(max_length, MAX_LENGTH)), generator=generator)


def logit_difference(
    folder: Path, tokens_BS: Tensor, our_logits_BSV: Tensor, rows: int, without_weights: re.Pattern[str] | None = None
) -> float:
    """Compares the folder's float32 logits with ours [B, S, V] for the first `rows` tokens of the vocabulary.

    Returns the largest difference, relative to the largest of ours where that is above 1. Raises CheckpointError when a
    weight is missing, left over or of another shape there, or the difference is above TOLERANCE. Tensors whose names
    match `without_weights` may be left over.
    """
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if without_weights is not None:
        found["unexpected_keys"] = [name for name in found["unexpected_keys"] if not without_weights.fullmatch(name)]
    wrong = {what: sorted(map(str, names)) for what, names in found.items() if names and what != "error_msgs"}
    if wrong:
        raise CheckpointError(f"{folder}: transformers does not find the weights that it expects: {wrong}.")
    with torch.no_grad():
        logits_BSV = model.eval()(tokens_BS).logits[..., :rows]
    our_logits_BSV = our_logits_BSV[..., :rows]
    if logits_BSV.shape != our_logits_BSV.shape:
        shapes = f"{tuple(logits_BSV.shape)} logits, not {our_logits_BSV.shape}"
        raise CheckpointError(f"{folder}: transformers computes {shapes}.")
    difference = float((logits_BSV - our_logits_BSV).abs().max() / our_logits_BSV.abs().max().clamp(min=1.0))
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{folder}: the logits of the exported model differ from those of the checkpoint by {difference:.1e}; at "
            f"most {TOLERANCE:.0e} is rounding. The export is wrong: nothing was kept of it."
        )
    return difference
