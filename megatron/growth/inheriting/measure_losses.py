"""Measures a reference and the model that is made of it on the same tokens, before anything is written."""

from __future__ import annotations

from torch import Tensor

from megatron.growth.inheriting.inherit_checkpoint import Reference
from megatron.growth.inheriting.inherit_operator import Inheritance, inherited_layers
from megatron.growth.measure_change import in_float32, logits_of_layers, next_token_loss


def measure_losses(reference: Reference, inheritance: Inheritance, tokens_BS: Tensor) -> tuple[float, float]:
    """Computes the loss of the reference and of the new model in float32 [nat]; a layer is in memory at a time."""
    names = list(inheritance.reference_layouts)
    before = (in_float32(reference.read(name)) for name in names)
    after = inherited_layers(lambda name: in_float32(reference.read(name)), inheritance)
    rows = inheritance.vocab.actual if inheritance.before.mask_padded_vocab else inheritance.vocab.padded
    losses = [
        next_token_loss(logits_of_layers(model, inheritance.vocab, layers, tokens_BS)[..., :rows], tokens_BS)
        for model, layers in ((inheritance.before, before), (inheritance.after, after))
    ]
    return losses[0], losses[1]
