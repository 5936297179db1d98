"""Whole parameters from the parts that NeoX's tensor-parallel ranks saved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.checkpointing.convert.imported_weights import VOCABULARY
from megatron.checkpointing.convert.neox.neox_files import StoredTensor
from megatron.checkpointing.states.parameter_layout import merge
from megatron.errors import CheckpointError
from megatron.mpu.parameters import ParameterSpec


class NeoxMerger:
    """Merges the parameters of one checkpoint, and keeps in mind which of their replicas differed."""

    def __init__(self, vocabulary_rows: int, summed: tuple[str, ...]) -> None:
        """Takes the ends of the names of parameters that are `summed` from the ranks' parts."""
        self.vocabulary_rows = vocabulary_rows
        self.summed = summed
        self.differing: dict[str, float] = {}
        """Name of a replicated parameter whose ranks did not agree -> their largest difference; it was averaged."""

    def whole(self, name: str, stored: Sequence[StoredTensor], spec: ParameterSpec) -> Tensor:
        """Returns the parameter `name`, ours, with as many vocabulary rows as were saved.

        Columns and rows are split as in Megatron, the vocabulary by rows; the head of `output_layer_parallelism: row`
        by columns. What is neither split nor summed are replicas, as norms always are. Replicas that training let drift
        apart are averaged, as NeoX's own converter does. TokenFormer's release keeps whole parameter tokens on every
        rank. Raises CheckpointError when a part has another shape than its share.
        """
        parts = [part.read() for part in stored]
        if name in VOCABULARY:
            return self._whole_vocabulary(stored, parts, spec.full_shape[1])
        if len(parts) > 1 and spec.shard_dim is not None and any(part.shape != spec.full_shape for part in parts):
            try:
                return merge(parts, spec)
            except CheckpointError as error:
                raise CheckpointError(f"{stored[0]}: {error}") from error
        for part, tensor in zip(stored, parts, strict=True):
            _require_shape(part, tensor, spec.full_shape)
        if len(parts) == 1:
            return parts[0]
        together = torch.stack([part.double() for part in parts])
        if name.endswith(self.summed):
            return together.sum(0).to(parts[0].dtype)
        apart = float((together - together[0]).abs().max())
        if apart == 0.0:
            return parts[0]
        self.differing[name] = apart
        return together.mean(0).to(parts[0].dtype)

    def _whole_vocabulary(self, stored: Sequence[StoredTensor], parts: list[Tensor], width: int) -> Tensor:
        by_columns = len(parts) > 1 and parts[0].shape == (self.vocabulary_rows, width // len(parts))
        share = (
            (self.vocabulary_rows, width // len(parts)) if by_columns else (self.vocabulary_rows // len(parts), width)
        )
        for part, tensor in zip(stored, parts, strict=True):
            _require_shape(part, tensor, share)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1 if by_columns else 0)


def _require_shape(part: StoredTensor, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{part}: it has shape {tuple(tensor.shape)}, not {shape}")
