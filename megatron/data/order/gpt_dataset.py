"""Fixed-length samples of one tokenized dataset, in NeoX's order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from megatron.data.dataset_format import TokenDataset
from megatron.data.order.sample_index import SampleIndex
from megatron.errors import DataError


class GPTDataset(Dataset[npt.NDArray[np.int64]]):
    """Samples of S + 1 tokens, int64 [S + 1]: the inputs and, shifted by one, the labels; S is seq_length.

    As in NeoX the length is one less than the number of samples in the index; item `len` is still served, and items
    beyond wrap modulo the length. Reading raises DataError when a token id is not below `vocab_size`, the padded
    vocabulary.
    """

    def __init__(self, documents: TokenDataset, index: SampleIndex, vocab_size: int) -> None:
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
        documents = self.index.doc_idx[first : last + 1].tolist()
        stops = self.documents.sizes[documents].tolist()
        stops[-1] = last_offset + 1
        starts = [first_offset] + [0] * (last - first)
        pieces = [
            self.documents.read(document, start, stop - start)
            for document, start, stop in zip(documents, starts, stops, strict=True)
        ]
        tokens = np.concatenate(pieces, dtype=np.int64)
        # Seen as unsigned, a negative id of a damaged file is too large as well.
        if tokens.view(np.uint64).max() >= self.vocab_size:
            raise self._foreign_token(documents, pieces)
        return tokens

    def _foreign_token(self, documents: list[int], pieces: list[npt.NDArray[np.integer]]) -> DataError:
        largest = self.vocab_size - 1
        document, token = next(
            (document, token)
            for document, piece in zip(documents, pieces, strict=True)
            for token in piece.tolist()
            if not 0 <= token <= largest
        )
        return DataError(
            f"{self.documents.token_file}: document {document:,} holds the token id {token}, but the model's "
            f"vocabulary ends at {largest}. Configure the tokenizer that made this dataset, or tokenize the data again."
        )
