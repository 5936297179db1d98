"""Samples that lie in a dataset as they are to be read, such as Pythia's: one row of seq_length + 1 tokens each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from megatron.data.dataset_format import TokenDataset
from megatron.errors import DataError


class PreshuffledDataset(Dataset[npt.NDArray[np.int64]]):
    """Rows of a dataset in the order in which they lie, int64 [S + 1]; items beyond the last start over.

    Step N of a run with B samples a step reads rows (N - 1) * B to N * B - 1, on any number of ranks, as the published
    Pythia models did (github.com/EleutherAI/pythia, utils/batch_viewer.py). Reading raises DataError when a token id is
    not below `vocab_size`, the padded vocabulary.
    """

    def __init__(self, rows: TokenDataset, part: range, vocab_size: int, seq_length: int) -> None:
        """Takes the rows of `part`. Raises DataError when one has another length than seq_length + 1."""
        self.rows = rows
        self.part = part
        self.vocab_size = vocab_size
        self.row_length = seq_length + 1
        sizes = rows.sizes[part.start : part.stop]
        wrong = np.flatnonzero(sizes != self.row_length)
        if len(wrong):
            raise DataError(
                f"{rows.token_file}: row {part.start + int(wrong[0]):,} has {int(sizes[wrong[0]]):,} tokens; with "
                f"`preshuffled`, each has seq_length + 1 = {self.row_length:,}. Set seq_length to "
                f"{int(sizes[wrong[0]]) - 1:,}, or leave `preshuffled` out for a dataset of documents."
            )

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, item: int) -> npt.NDArray[np.int64]:
        row = self.part[item % len(self)]
        tokens = self.rows.read(row, 0, self.row_length).astype(np.int64)
        if tokens.view(np.uint64).max() >= self.vocab_size:
            raise DataError(
                f"{self.rows.token_file}: row {row:,} holds the token id {int(tokens.max())}, but the model's "
                f"vocabulary ends at {self.vocab_size - 1}. Configure the tokenizer that made this dataset."
            )
        return tokens
