"""Keys and values of the tokens that a batch has seen, so that each further token costs one token's work.

Shape letters: see megatron/README.md. S counts the new tokens, T all that were seen with these, and C the columns that
there is room for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.kernels.attention.causal_attention import CausalAttention, cached_attention
from megatron.model.positions import RotaryEmbedding, RotaryTables


class KeyValueCache:
    """The cache of all layers, in memory that is reserved at once: 2 L B G C E numbers.

    Rows of unequal length are padded on the left: `padding_B` is the number of leading columns of each row that hold
    no token. Nothing ever attends to them, and positions count from the first token of the row. A forward pass calls
    `begin` once, and then each layer's `attend`.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        padding_B: Tensor | None = None,
    ) -> None:
        """Reserves the memory. `num_kv_heads` are those of this rank."""
        shape = (num_layers, batch, num_kv_heads, capacity, head_size)
        self.keys_LBGCE = torch.empty(shape, dtype=dtype, device=device)
        self.values_LBGCE = torch.empty(shape, dtype=dtype, device=device)
        self.padding_B1 = None if padding_B is None or not padding_B.any() else padding_B.to(device).unsqueeze(1)
        self.least_padding = 0 if padding_B is None else int(padding_B.min())
        self.seen = 0
        self.positions_BS = torch.empty(0, dtype=torch.long, device=device)
        self.mask_B1ST: Tensor | None = None
        self.rotary_tables: RotaryTables | None = None
        self.layers = [LayerCache(self, index) for index in range(num_layers)]

    @property
    def capacity(self) -> int:
        """Returns the columns that there is room for [tokens]."""
        return self.keys_LBGCE.shape[3]

    @property
    def longest(self) -> int:
        """Returns the length of the longest sequence so far, without its padding [tokens]."""
        return self.seen - self.least_padding

    def begin(self, num_new: int) -> None:
        """Makes room for `num_new` columns, and finds their positions [B or 1, S] and the columns that they attend to.

        Raises ValueError when they are more than there is room for.
        """
        if self.seen + num_new > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens; {self.seen + num_new} are needed")
        columns_S = torch.arange(self.seen, self.seen + num_new, device=self.keys_LBGCE.device)
        self.seen += num_new
        self.rotary_tables = None
        if self.padding_B1 is None:
            self.positions_BS = columns_S.unsqueeze(0)
            self.mask_B1ST = None if num_new in (1, self.seen) else self._causal(columns_S).unsqueeze(0).unsqueeze(0)
            return
        self.positions_BS = (columns_S - self.padding_B1).clamp_(min=0)
        columns_T = torch.arange(self.seen, device=columns_S.device)
        # Padding sees itself: a row of nothing but -inf has no softmax.
        itself_ST = columns_T == columns_S.unsqueeze(1)
        tokens_BT = columns_T >= self.padding_B1
        self.mask_B1ST = ((self._causal(columns_S) & tokens_BT.unsqueeze(1)) | itself_ST).unsqueeze(1)

    def _causal(self, columns_S: Tensor) -> Tensor:
        """Returns the mask [S, T] of the columns up to each new one."""
        return torch.arange(self.seen, device=columns_S.device) <= columns_S.unsqueeze(1)

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps some rows of the batch alone: their indices, ascending."""
        for buffer_LBGCE in (self.keys_LBGCE, self.values_LBGCE):
            # In place, since there may be no memory for a second buffer.
            for to, row in enumerate(rows):
                if to != row:
                    buffer_LBGCE[:, to, :, : self.seen] = buffer_LBGCE[:, row, :, : self.seen]
        self.keys_LBGCE, self.values_LBGCE = self.keys_LBGCE[:, : len(rows)], self.values_LBGCE[:, : len(rows)]
        if self.padding_B1 is not None:
            self.padding_B1 = self.padding_B1[list(rows)]
            self.least_padding = int(self.padding_B1.min())


class LayerCache:
    """One layer's part of a cache."""

    def __init__(self, cache: KeyValueCache, index: int) -> None:
        self.cache = cache
        self.index = index

    def rotary_tables(self, rotary: RotaryEmbedding) -> RotaryTables:
        """Returns the tables of the new tokens' positions, which all layers share."""
        if self.cache.rotary_tables is None:
            self.cache.rotary_tables = rotary.tables(self.cache.positions_BS)
        return self.cache.rotary_tables

    def attend(
        self,
        q_BSHE: Tensor,
        k_BSGE: Tensor,
        v_BSGE: Tensor,
        causal_attention: CausalAttention,
        scale: float | None = None,
    ) -> Tensor:
        """Keeps the new keys and values, and attends from the new tokens to all that were seen: [B, S, H, E].

        `causal_attention` is used where nothing was seen before and there is no padding. `scale` as there.
        """
        cache, num_new = self.cache, k_BSGE.shape[1]
        before, seen = cache.seen - num_new, cache.seen
        keys_BGCE, values_BGCE = cache.keys_LBGCE[self.index], cache.values_LBGCE[self.index]
        keys_BGCE[:, :, before:seen] = k_BSGE.transpose(1, 2)
        values_BGCE[:, :, before:seen] = v_BSGE.transpose(1, 2)
        if before == 0 and cache.mask_B1ST is None:
            return causal_attention(q_BSHE, k_BSGE, v_BSGE, 0.0, scale)
        return cached_attention(q_BSHE, keys_BGCE[:, :, :seen], values_BGCE[:, :, :seen], cache.mask_B1ST, scale)
