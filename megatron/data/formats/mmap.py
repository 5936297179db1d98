"""Tokenized documents in NeoX's memory-mapped format: `<prefix>.bin` and `<prefix>.idx`.

.bin holds the token ids of all sequences, one after the other. .idx, version 1, little endian:

    9 bytes   b"MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     dtype code of the tokens
    uint64    number of sequences, n
    uint64    number of document boundaries, m
    int32[n]  length of each sequence [tokens]
    int64[n]  start of each sequence in .bin [bytes]
    int64[m]  sequence at which each document starts, closed by n

The writer stores one sequence per document; the reader takes what Megatron's and NeoX's tools write.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.data.dataset_format import DATASET_FORMATS, DatasetFormat, Position, dataset_file
from megatron.errors import DataError
from megatron.io.checkout import hint_at_checkout
from megatron.io.working_file import FileFacts, WorkingFile, publish, working_path

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
_DATA_SUFFIX = ".bin"
_INDEX_SUFFIX = ".idx"
_SIZES_SUFFIX = ".sizes"
_SIZE_DTYPE = np.dtype(np.int32)
_LARGEST_UINT16_VOCABULARY = 65500
ENTRIES_AT_A_TIME = 1 << 20
"""Entries of an index that are handled at once."""


def data_file(prefix: Path) -> Path:
    """Returns the path of the file with the tokens."""
    return dataset_file(prefix, _DATA_SUFFIX)


def index_file(prefix: Path) -> Path:
    """Returns the path of the file with the lengths and positions of the sequences."""
    return dataset_file(prefix, _INDEX_SUFFIX)


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the type in which NeoX stores tokens: uint16 for vocabularies below 65,500, else int32.

    Labels, for which `vocab_size` is 0, are int32.
    """
    return np.dtype(np.uint16 if 0 < vocab_size < _LARGEST_UINT16_VOCABULARY else np.int32)


class IndexedDataset:
    """Token sequences behind a memory map; opening reads no tokens.

    `sizes` int32 [n] is the length of each sequence [tokens], `document_indices` int64 [m] the sequences at which
    documents start.
    """

    def __init__(self, prefix: Path, *, is_checked: bool = False) -> None:
        """Opens both files. Raises DataError when one is missing, truncated, damaged or of another format.

        The index is read whole for that, unless another process of this machine has done so (`is_checked`).
        """
        self.prefix = prefix
        self.token_file = data_file(prefix)
        index_path, data_path = index_file(prefix), self.token_file
        for path in (index_path, data_path):
            if not path.is_file():
                raise DataError(
                    f"{path}: no such file. A dataset is the pair {data_path.name} and {index_path.name}; "
                    "give their common path without the ending, or make them with tools/datasets/preprocess_data.py."
                    f"{hint_at_checkout(path)}"
                )
        self.dtype, num_sequences, num_boundaries = _read_header(index_path)
        buffer = _mapped(index_path, np.dtype(np.uint8))
        sizes_end = _HEADER.size + 4 * num_sequences
        pointers_end = sizes_end + 8 * num_sequences
        self.sizes = buffer[_HEADER.size : sizes_end].view(np.int32)
        self._pointers = buffer[sizes_end:pointers_end].view(np.int64)
        self.document_indices = buffer[pointers_end : pointers_end + 8 * num_boundaries].view(np.int64)
        if not is_checked:
            self._check_positions(data_path)
        self._tokens = _mapped(data_path, self.dtype)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> npt.NDArray[np.integer]:
        """Returns all tokens of sequence `index`, read-only."""
        return self.read(index, 0, int(self.sizes[index]))

    def read(self, index: int, offset: int, length: int) -> npt.NDArray[np.integer]:
        """Returns `length` tokens of sequence `index` from token `offset` on, read-only.

        Raises IndexError when the sequence ends before.
        """
        if not 0 <= offset <= offset + length <= self.sizes[index]:
            raise IndexError(
                f"tokens {offset} to {offset + length} of a sequence of {self.sizes[index]} tokens ({self.prefix})"
            )
        start = int(self._pointers[index]) // self.dtype.itemsize + offset
        return self._tokens[start : start + length]

    def blocks(
        self, tokens_at_a_time: int = 1 << 22
    ) -> Iterator[tuple[int, npt.NDArray[np.integer], npt.NDArray[np.int64]]]:
        """Yields the first sequence, the tokens and the lengths of consecutive sequences, read into memory.

        A block ends before `tokens_at_a_time` tokens, unless it is a single sequence.
        """
        start = position = 0
        while start < len(self):
            lengths = self.sizes[start : start + ENTRIES_AT_A_TIME].astype(np.int64)
            fitting = int(np.searchsorted(np.cumsum(lengths), tokens_at_a_time, side="right"))
            lengths = lengths[: max(fitting, 1)]
            count = int(lengths.sum())
            tokens = np.fromfile(self.token_file, self.dtype, count, offset=position * self.dtype.itemsize)
            yield start, tokens, lengths
            start, position = start + len(lengths), position + count

    def __reduce__(self) -> tuple[Callable[[Path], IndexedDataset], tuple[Path]]:
        # A loader process started by spawn opens the files itself; pickling a memory map would copy the dataset.
        return open_checked, (self.prefix,)

    def _check_positions(self, data_path: Path) -> None:
        """Raises DataError unless each sequence starts where its predecessor ends, up to the end of the data file."""
        position = 0
        for start in range(0, len(self), ENTRIES_AT_A_TIME):
            sizes = self.sizes[start : start + ENTRIES_AT_A_TIME].astype(np.int64)
            pointers = position + _starts(sizes) * self.dtype.itemsize
            if sizes.min() < 0 or not np.array_equal(pointers, self._pointers[start : start + ENTRIES_AT_A_TIME]):
                raise DataError(
                    f"{index_file(self.prefix)}: sequence lengths and positions contradict each other near sequence "
                    f"{start:,}. The file is damaged; tokenize the data again."
                )
            position += int(sizes.sum()) * self.dtype.itemsize
        held = data_path.stat().st_size
        if held != position:
            raise DataError(
                f"{data_path}: holds {held:,} bytes where {index_file(self.prefix).name} promises {position:,}. "
                "One of the two is truncated or from another dataset; copy both again, or tokenize the data again."
            )


def open_checked(prefix: Path) -> IndexedDataset:
    """Opens a dataset whose index another process of this machine has looked through."""
    return IndexedDataset(prefix, is_checked=True)


class IndexedDatasetWriter:
    """Streams documents into `<prefix>.bin` and `<prefix>.idx`; takes no more memory for many documents.

    As a context manager it publishes both files when the `with` block ends without an exception; otherwise nothing is
    left, and an older pair stays as it was.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike, position: Position | None = None) -> None:
        """Opens the working files, at the position that an earlier writer has saved."""
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self._code = next(code for code, known in _DTYPE_CODES.items() if known == self.dtype)
        self._limits = np.iinfo(self.dtype)
        position = position or {}
        self._tokens = WorkingFile(data_file(prefix), position.get(_DATA_SUFFIX, 0))
        # The index begins with all lengths and goes on with all starts: the lengths wait in a file of their own.
        self._sizes = WorkingFile(dataset_file(prefix, _SIZES_SUFFIX), position.get(_SIZES_SUFFIX, 0))

    @property
    def num_documents(self) -> int:
        """Returns the number of documents added so far."""
        return self._sizes.size // _SIZE_DTYPE.itemsize

    @property
    def num_tokens(self) -> int:
        """Returns the number of tokens added so far."""
        return self._tokens.size // self.dtype.itemsize

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.finish()
                self.publish()
        finally:
            self.discard()

    def add_document(self, tokens: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Appends one document. Raises DataError when a token id does not fit the file's type."""
        ids = np.asarray(tokens, dtype=np.int64)
        self.add_documents(ids, np.array([len(ids)]))

    def add_documents(self, tokens: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer]) -> None:
        """Appends documents of `lengths` [documents] tokens each, which stand one after the other in `tokens`.

        Raises DataError when a token id does not fit the file's type, or the disk is full.
        """
        if tokens.dtype != self.dtype:
            if tokens.size and (tokens.min() < self._limits.min or tokens.max() > self._limits.max):
                raise self._misfit(tokens, lengths)
            tokens = tokens.astype(self.dtype)
        self._tokens.write(np.ascontiguousarray(tokens).data.cast("B"))
        self._sizes.write(lengths.astype(_SIZE_DTYPE).tobytes())

    def save(self) -> Position:
        """Brings what was added to disk; returns the position from which another writer continues."""
        return {_DATA_SUFFIX: self._tokens.save(), _SIZES_SUFFIX: self._sizes.save()}

    def finish(self) -> dict[str, FileFacts]:
        """Writes the index; both files are whole then, under their working names. Returns their sizes and hashes."""
        self._sizes.finish()
        return {_DATA_SUFFIX: self._tokens.finish(), _INDEX_SUFFIX: self._write_index()}

    def publish(self) -> None:
        """Gives both files their names: the tokens first, for the index makes the dataset complete."""
        self._tokens.publish()
        publish(index_file(self.prefix))
        self._sizes.discard()

    def discard(self) -> None:
        """Deletes the working files."""
        self._tokens.discard()
        self._sizes.discard()
        working_path(index_file(self.prefix)).unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the working files and leaves them to a later writer."""
        self._tokens.close()
        self._sizes.close()

    def _misfit(self, tokens: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer]) -> DataError:
        wrong = int(np.flatnonzero((tokens < self._limits.min) | (tokens > self._limits.max))[0])
        document = int(np.searchsorted(np.cumsum(lengths), wrong, side="right"))
        start = int(lengths[:document].sum())
        ids = tokens[start : start + int(lengths[document])]
        return DataError(
            f"{data_file(self.prefix)}: token ids {ids.min()} to {ids.max()} of document "
            f"{self.num_documents + document:,} do not fit {self.dtype.name}. The tokenizer's ids exceed its own "
            "vocabulary size; check its files."
        )

    def _write_index(self) -> FileFacts:
        num_documents = self.num_documents
        index = WorkingFile(index_file(self.prefix))
        index.write(_HEADER.pack(_MAGIC, _VERSION, self._code, num_documents, num_documents + 1))
        for sizes in self._saved_sizes():
            index.write(sizes.tobytes())
        position = 0
        for sizes in self._saved_sizes():
            chunk = sizes.astype(np.int64)
            index.write((position + _starts(chunk) * self.dtype.itemsize).tobytes())
            position += int(chunk.sum()) * self.dtype.itemsize
        for start in range(0, num_documents + 1, ENTRIES_AT_A_TIME):
            stop = min(start + ENTRIES_AT_A_TIME, num_documents + 1)
            index.write(np.arange(start, stop, dtype=np.int64).tobytes())
        return index.finish()

    def _saved_sizes(self) -> Iterator[npt.NDArray[np.int32]]:
        with self._sizes.working.open("rb") as file:
            while content := file.read(ENTRIES_AT_A_TIME * _SIZE_DTYPE.itemsize):
                yield np.frombuffer(content, _SIZE_DTYPE)


DATASET_FORMATS.register("mmap")(
    DatasetFormat(
        token_suffix=_DATA_SUFFIX,
        index_suffixes=(_INDEX_SUFFIX,),
        working_suffixes=(_SIZES_SUFFIX,),
        open=IndexedDataset,
        open_checked=open_checked,
        write=lambda prefix, vocab_size, position: IndexedDatasetWriter(prefix, token_dtype(vocab_size), position),
    )
)


def _starts(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the starts of consecutive pieces, counted from the first."""
    return np.cumsum(sizes) - sizes


def _mapped(path: Path, dtype: np.dtype) -> npt.NDArray[Any]:
    """Maps a file as a read-only array. An empty file, which cannot be mapped, becomes an empty array."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    """Returns the token dtype, the number of sequences and the number of document boundaries."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if not head.startswith(_MAGIC):
        raise DataError(
            f"{path}: not an mmap index (it does not start with {_MAGIC!r}). Other dataset formats are not read; "
            "tokenize the data with tools/datasets/preprocess_data.py."
        )
    if len(head) < _HEADER.size:
        raise DataError(f"{path}: truncated within its header. Copy it again, or tokenize the data again.")
    _, version, code, num_sequences, num_boundaries = _HEADER.unpack(head)
    if version != _VERSION:
        raise DataError(f"{path}: mmap index of version {version}; only version {_VERSION} is read.")
    if code not in _DTYPE_CODES:
        known = ", ".join(f"{number} {dtype.name}" for number, dtype in _DTYPE_CODES.items())
        raise DataError(
            f"{path}: dtype code {code} is not one for token ids ({known}). The file is damaged, or holds something "
            "else than tokens, such as rewards."
        )
    expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
    held = path.stat().st_size
    if held != expected:
        raise DataError(
            f"{path}: holds {held:,} bytes where its header promises {expected:,} ({num_sequences:,} sequences). "
            "It is truncated or damaged; copy it again, or tokenize the data again."
        )
    return _DTYPE_CODES[code], num_sequences, num_boundaries
