"""The formats in which tokenized documents lie on disk.

A format is one module in `formats/`, registered under the module's name, by which `data_impl` selects it. Whatever
reads or writes a dataset goes through it, so a new format is a new file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from megatron.registry import Registry

INFER = "infer"
"""Value of `data_impl` that leaves the format to the files that are there."""

DEFAULT_FORMAT = "mmap"


class TokenDataset(Protocol):
    """Tokenized documents, open for reading. Instances are pickled to loader processes."""

    @property
    def prefix(self) -> Path:
        """Returns the path that the dataset's files have in common, without their endings."""

    @property
    def token_file(self) -> Path:
        """Returns the file that holds the tokens, for messages."""

    @property
    def sizes(self) -> npt.NDArray[np.integer]:
        """Returns the length of each document [tokens]."""

    def __len__(self) -> int:
        """Returns the number of documents."""

    def read(self, index: int, offset: int, length: int) -> npt.NDArray[np.integer]:
        """Returns `length` tokens of document `index` from token `offset` on, read-only."""


class TokenDatasetWriter(Protocol):
    """Writes documents in order. The dataset appears when the `with` block ends without an exception."""

    def __enter__(self) -> Self:
        """Opens the files. Raises DataError when they cannot be written."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Completes the files, or removes them after an exception."""

    def add_document(self, tokens: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Appends one document. Raises DataError when a token id does not fit the file's type."""


@dataclass(frozen=True)
class DatasetFormat:
    """One format: its files and what opens and writes them."""

    token_suffix: str
    """Ending of the file that holds the tokens. It may be of any size, so its fingerprint is that of a sample."""

    index_suffixes: tuple[str, ...]
    """Endings of the smaller files beside it, whose fingerprints are of the whole."""

    open: Callable[[Path], TokenDataset]
    """Opens the dataset of a prefix. Raises DataError when a file is missing or damaged."""

    write: Callable[[Path, int], TokenDatasetWriter]
    """Makes a writer for a prefix and a vocabulary size."""

    def token_file(self, prefix: Path) -> Path:
        """Returns the path of the file that holds the tokens."""
        return dataset_file(prefix, self.token_suffix)

    def exists(self, prefix: Path) -> bool:
        """Tells whether all files of the format are there."""
        return all(dataset_file(prefix, suffix).is_file() for suffix in (self.token_suffix, *self.index_suffixes))


DATASET_FORMATS: Registry[DatasetFormat] = Registry("dataset format", package="megatron.data.formats")


def dataset_file(prefix: Path, suffix: str) -> Path:
    """Returns the path of one file of a dataset; a prefix may hold dots."""
    return prefix.with_name(prefix.name + suffix)


def dataset_format(impl: str, prefix: Path) -> DatasetFormat:
    """Returns the format that `data_impl` names; with `infer`, the one whose files are at `prefix`.

    Where there are none, `infer` means mmap, whose error tells how to make a dataset.
    """
    if impl != INFER:
        return DATASET_FORMATS[impl]
    found = (DATASET_FORMATS[name] for name in DATASET_FORMATS if DATASET_FORMATS[name].exists(prefix))
    return next(found, DATASET_FORMATS[DEFAULT_FORMAT])
