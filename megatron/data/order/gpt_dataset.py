"""Fixed-length samples of one tokenized dataset, in NeoX's order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from megatron.data.dataset_format import MASKED, TokenDataset
from megatron.data.order.sample_index import SampleIndex
from megatron.errors import DataError


class GPTDataset(Dataset[npt.NDArray[np.int64]]):
    """Samples of S + 1 tokens, int64 [S + 1]: the inputs and, shifted by one, the labels; S is seq_length.

    As in NeoX the length is one less than the number of samples in the index; item `len` is still served, and items
    beyond wrap modulo the length. With `labels`, a dataset of as many tokens in each document, samples are [2, S + 1]:
    the tokens, and a label for each that is a token id, or MASKED where the loss does not count it. Reading raises
    DataError when a token id is not below `vocab_size`, the padded vocabulary, and when a damaged index leads out of
    the documents.
    """

    def __init__(
        self,
        documents: TokenDataset,
        index: SampleIndex,
        vocab_size: int,
        seq_length: int,
        labels: TokenDataset | None = None,
    ) -> None:
        self.documents = documents
        self.labels = labels
        self.index = index
        self.vocab_size = vocab_size
        self.seq_length = seq_length

    def __len__(self) -> int:
        return max(1, len(self.index.shuffle_idx) - 1)

    def __getitem__(self, item: int) -> npt.NDArray[np.int64]:
        if item >= len(self.index.shuffle_idx):
            item %= len(self)
        documents, starts, stops = self._places(int(self.index.shuffle_idx[item]))
        pieces = [
            self.documents.read(document, start, stop - start)
            for document, start, stop in zip(documents, starts, stops, strict=True)
        ]
        tokens = np.concatenate(pieces, dtype=np.int64)
        # Seen as unsigned, a negative id of a damaged file is too large as well.
        if tokens.view(np.uint64).max() >= self.vocab_size:
            raise self._foreign_token(self.documents, documents, pieces)
        if self.labels is None:
            return tokens
        label_pieces = [
            self.labels.read(document, start, stop - start)
            for document, start, stop in zip(documents, starts, stops, strict=True)
        ]
        labels = np.concatenate(label_pieces, dtype=np.int64)
        if labels.max() >= self.vocab_size or labels[labels != MASKED].min(initial=0) < 0:
            raise self._foreign_token(self.labels, documents, label_pieces)
        return np.stack([tokens, labels])

    def _places(self, sample: int) -> tuple[list[int], list[int], list[int]]:
        """Returns the documents of a sample, and where it starts and stops in each [tokens].

        Raises DataError where the index, which is read from files, does not lead to as many tokens as a sample has.
        """
        index, sizes = self.index, self.documents.sizes
        if 0 <= sample < len(index.shuffle_idx):
            first, first_offset = index.sample_idx[sample].tolist()
            last, last_offset = index.sample_idx[sample + 1].tolist()
            if 0 <= first <= last < len(index.doc_idx):
                documents = index.doc_idx[first : last + 1]
                if documents.min() >= 0 and documents.max() < len(sizes):
                    stops = sizes[documents]
                    inside = 0 <= first_offset <= stops[0] and 0 <= last_offset < stops[-1]
                    length = int(stops[:-1].sum(dtype=np.int64)) + last_offset + 1 - first_offset
                    if inside and length == self.seq_length + 1:
                        starts = [first_offset] + [0] * (last - first)
                        return documents.tolist(), starts, [*stops[:-1].tolist(), last_offset + 1]
        raise DataError(
            f"{self.documents.token_file}: its sample index leads out of the documents, so a file of the index cache "
            "is damaged. Delete the folder (index_cache_dir, or the one beside the dataset); it is made anew."
        )

    def _foreign_token(
        self, dataset: TokenDataset, documents: list[int], pieces: list[npt.NDArray[np.integer]]
    ) -> DataError:
        largest = self.vocab_size - 1
        document, token = next(
            (document, token)
            for document, piece in zip(documents, pieces, strict=True)
            for token in piece.tolist()
            if not (0 <= token <= largest or (dataset is self.labels and token == MASKED))
        )
        return DataError(
            f"{dataset.token_file}: document {document:,} holds the token id {token}, but the model's "
            f"vocabulary ends at {largest}. Configure the tokenizer that made this dataset, or tokenize the data again."
        )
