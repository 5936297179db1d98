"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), on a part of each head as GPT-NeoX applies it.

Shape letters: see megatron/README.md; r counts the rotated features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.config.sections.model import ModelConfig
from megatron.errors import ConfigError
from megatron.kernels.rotary.rotary import ROTARY, Rotation

RotaryTables = tuple[Tensor, Tensor]
"""Cosines and sines of the angles of the r rotated features, each [B or 1, S, 1, r] in float32."""


class RotaryEmbedding(nn.Module):
    """Rotates pairs (i, i + r/2) of the first r = int(E * rotary_pct) features of each head by position * base^(-2i/r).

    Angles, sines and cosines are float32 whatever the model's format; the published code keeps them in fp16, which
    this differs from on purpose. r is 0, and nothing is rotated, for other kinds of position embedding.
    Raises ConfigError when r is odd, or when rotary_pct leaves nothing to rotate.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        head_size = model.hidden_size // model.num_attention_heads
        self.num_rotated = int(head_size * model.rotary_pct) if model.pos_emb == "rotary" else 0
        if model.pos_emb == "rotary" and (self.num_rotated == 0 or self.num_rotated % 2):
            raise ConfigError(
                f"rotary_pct={model.rotary_pct} of a head of {head_size} features is {self.num_rotated} features; "
                "pairs are rotated, so it must be even and at least 2. Change rotary_pct, or use pos_emb: none."
            )
        self.base = model.rotary_emb_base
        self.rotate: Rotation = ROTARY["eager"].load()
        self._tables: RotaryTables | None = None

    def forward(self, q_BSHE: Tensor, k_BSHE: Tensor, tables: RotaryTables | None = None) -> tuple[Tensor, Tensor]:
        """Rotates queries and keys. Positions count from 0 along the sequence unless `tables` of others are given."""
        if self.num_rotated == 0:
            return q_BSHE, k_BSHE
        cos_BS1r, sin_BS1r = tables or self._first_positions(q_BSHE.shape[1], q_BSHE.device)
        return self.rotate(q_BSHE, k_BSHE, cos_BS1r, sin_BS1r)

    def tables(self, positions_BS: Tensor) -> RotaryTables:
        """Computes the tables of positions [B or 1, S]; they are the same in every layer."""
        exponents = torch.arange(0, self.num_rotated, 2, dtype=torch.float32, device=positions_BS.device)
        frequencies = 1.0 / self.base ** (exponents / max(self.num_rotated, 1))
        angles_BS1r = (positions_BS.unsqueeze(-1).float() * frequencies).repeat(1, 1, 2).unsqueeze(-2)
        return angles_BS1r.cos(), angles_BS1r.sin()

    def _first_positions(self, length: int, device: torch.device) -> RotaryTables:
        """Returns the tables of positions 0 to `length` - 1, which are kept between calls.

        They are plain tensors: buffers would be cast with the module.
        """
        if self._tables is None or self._tables[0].shape[1] != length or self._tables[0].device != device:
            # Tables made under inference mode could not be saved for a later backward pass.
            with torch.inference_mode(False):
                self._tables = self.tables(torch.arange(length, device=device).unsqueeze(0))
        return self._tables
