"""Fixed-length samples of one tokenized dataset, in NeoX's order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from megatron.data.indexed_dataset import IndexedDataset, data_file
from megatron.data.sample_index import SampleIndex
from megatron.errors import DataError


class GPTDataset(Dataset[npt.NDArray[np.int64]]):
    """Item i is an int64 array [seq_length + 1]: a sample's inputs and, shifted by one, its labels.

    As in NeoX the length is one less than the number of samples in the index; item `len` is still served, and items
    beyond wrap modulo the length. Raises DataError when a token id is not below `vocab_size` (the padded vocabulary).
    """

    def __init__(self, documents: IndexedDataset, index: SampleIndex, vocab_size: int) -> None:
        self.documents = documents
        self.index = index
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return max(1, len(self.index.shuffle_idx) - 1)

    def __getitem__(self, item: int) -> npt.NDArray[np.int64]:
        if item >= len(self.index.shuffle_idx):
            item %= len(self)
        sample = int(self.index.shuffle_idx[item])
        first, first_offset = self.index.sample_idx[sample].tolist()
        last, last_offset = self.index.sample_idx[sample + 1].tolist()
        pieces = []
        for position in range(first, last + 1):
            document = int(self.index.doc_idx[position])
            start = first_offset if position == first else 0
            stop = last_offset + 1 if position == last else int(self.documents.sizes[document])
            piece = self.documents.read(document, start, stop - start)
            self._check(piece, document)
            pieces.append(piece)
        return np.concatenate(pieces, dtype=np.int64)

    def _check(self, tokens: npt.NDArray[np.integer], document: int) -> None:
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise DataError(
                f"{data_file(self.documents.prefix)}: document {document:,} holds token ids from {tokens.min()} to "
                f"{tokens.max()}, but the model's vocabulary ends at {self.vocab_size - 1}. Configure the tokenizer "
                "that made this dataset, or tokenize the data again."
            )
