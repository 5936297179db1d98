"""Keys and values of the tokens that a batch has seen, so that each further token costs one token's work.

B batch, H heads on this rank, E features of a head, S new tokens, T tokens seen after them, P capacity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.config.sections.model import ModelConfig
from megatron.kernels.attention.op import CausalAttention, cached_attention
from megatron.model.positions import RotaryEmbedding, RotaryTables
from megatron.mpu.context import ParallelContext


class KeyValueCache:
    """The cache of all layers, in memory that is reserved at once: 2 L B H P E numbers.

    Rows of unequal length are padded on the left: `padding_B` is the number of leading columns of each row that hold
    no token. Nothing ever attends to them, and positions count from the first token of the row. A forward pass calls
    `begin` once, and then each layer's `attend`.
    """

    def __init__(
        self,
        model: ModelConfig,
        context: ParallelContext,
        *,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        padding_B: Tensor | None = None,
    ) -> None:
        heads = model.num_attention_heads // context.tensor_size
        shape = (model.num_layers, batch, heads, capacity, model.hidden_size // model.num_attention_heads)
        self.keys_LBHPE = torch.empty(shape, dtype=dtype, device=device)
        self.values_LBHPE = torch.empty(shape, dtype=dtype, device=device)
        self.padding_B1 = None if padding_B is None or not padding_B.any() else padding_B.to(device).unsqueeze(1)
        self.seen = 0
        self.positions_BS = torch.empty(0, dtype=torch.long, device=device)
        self.mask_B1ST: Tensor | None = None
        self.rotary_tables: RotaryTables | None = None
        self.layers = [LayerCache(self, index) for index in range(model.num_layers)]

    @property
    def capacity(self) -> int:
        """Columns that there is room for [tokens]."""
        return self.keys_LBHPE.shape[3]

    def begin(self, num_new: int) -> None:
        """Make room for `num_new` columns, and find their positions [B or 1, S] and what they attend to."""
        if self.seen + num_new > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens; {self.seen + num_new} are needed")
        columns_S = torch.arange(self.seen, self.seen + num_new, device=self.keys_LBHPE.device)
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
        return torch.arange(self.seen, device=columns_S.device) <= columns_S.unsqueeze(1)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some rows of the batch alone: their indices, ascending."""
        for buffer in (self.keys_LBHPE, self.values_LBHPE):
            # In place, since there may be no memory for a second buffer.
            for to, row in enumerate(rows):
                if to != row:
                    buffer[:, to, :, : self.seen] = buffer[:, row, :, : self.seen]
        self.keys_LBHPE, self.values_LBHPE = self.keys_LBHPE[:, : len(rows)], self.values_LBHPE[:, : len(rows)]
        if self.padding_B1 is not None:
            self.padding_B1 = self.padding_B1[list(rows)]


class LayerCache:
    """One layer's part of a cache."""

    def __init__(self, cache: KeyValueCache, index: int) -> None:
        self.cache = cache
        self.index = index

    def rotary_tables(self, rotary: RotaryEmbedding) -> RotaryTables:
        """Those of the new tokens' positions, each in its own row; computed for the first layer that asks."""
        if self.cache.rotary_tables is None:
            self.cache.rotary_tables = rotary.tables(self.cache.positions_BS)
        return self.cache.rotary_tables

    def attend(self, q_BSHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, causal_attention: CausalAttention) -> Tensor:
        """Keep the new keys and values, and attend from the new tokens to all that were seen: [B, S, H, E].

        `causal_attention` is used where nothing was seen before and there is no padding.
        """
        cache, num_new = self.cache, k_BSHE.shape[1]
        before, seen = cache.seen - num_new, cache.seen
        keys_BHPE, values_BHPE = cache.keys_LBHPE[self.index], cache.values_LBHPE[self.index]
        keys_BHPE[:, :, before:seen] = k_BSHE.transpose(1, 2)
        values_BHPE[:, :, before:seen] = v_BSHE.transpose(1, 2)
        if before == 0 and cache.mask_B1ST is None:
            return causal_attention(q_BSHE, k_BSHE, v_BSHE, 0.0)
        return cached_attention(q_BSHE, keys_BHPE[:, :, :seen], values_BHPE[:, :, :seen], cache.mask_B1ST)
