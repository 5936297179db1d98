"""From token samples to what the model and the loss read."""

from __future__ import annotations

import torch
from torch import Tensor


def to_inputs_and_labels(tokens: Tensor, *, eod_token: int | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Split tokens int64 [b, s + 1] into inputs [b, s] and (labels [b, s], loss_mask float32 [b, s]).

    The mask is 1; where `eod_token` is given it is 0 at the positions whose *input* is that token (NeoX's
    eod_mask_loss): what follows the end of a document is not predicted from it.
    """
    inputs = tokens[:, :-1].contiguous()
    labels = tokens[:, 1:].contiguous()
    loss_mask = torch.ones_like(inputs, dtype=torch.float32)
    if eod_token is not None:
        loss_mask.masked_fill_(inputs == eod_token, 0.0)
    return inputs, (labels, loss_mask)
