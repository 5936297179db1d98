"""The formats in which tokenized documents lie on disk.

A format is one module in `formats/`, registered under the module's name, by which `data_impl` selects it. Whatever
reads or writes a dataset goes through it, so a new format is a new file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron.io.working_file import FileFacts, publish, working_path
from megatron.registry import Registry

INFER = "infer"
"""Value of `data_impl` that leaves the format to the files that are there."""

DEFAULT_FORMAT = "mmap"

MASKED = -100
"""Label of a token that the loss does not count, as in NeoX's label datasets."""

Position = dict[str, int]
"""Position of a writer: sizes of its files, by names of its own."""


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
    """Writes documents in order, under working names; `publish` makes them a dataset.

    A process that was killed is continued from what its last `save` returned, byte for byte.
    """

    def add_documents(self, tokens: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer]) -> None:
        """Appends documents of `lengths` [documents] tokens each, which stand one after the other in `tokens`.

        Raises DataError when a token id does not fit the file's type, or the disk is full.
        """

    def save(self) -> Position:
        """Brings what was added to disk; returns the position from which `write` continues."""

    def finish(self) -> dict[str, FileFacts]:
        """Completes all files on disk, still under their working names; returns size and hash by ending."""

    def publish(self) -> None:
        """Gives the finished files their names."""

    def discard(self) -> None:
        """Deletes what was written; a published dataset stays."""

    def close(self) -> None:
        """Closes the files and leaves them to a later process."""


@dataclass(frozen=True)
class DatasetFormat:
    """One format: its files and what opens and writes them."""

    token_suffix: str
    """Ending of the file that holds the tokens. It may be of any size, so its fingerprint is that of a sample."""

    index_suffixes: tuple[str, ...]
    """Endings of the smaller files beside it, whose fingerprints are of the whole."""

    open: Callable[[Path], TokenDataset]
    """Opens the dataset of a prefix. Raises DataError when a file is missing or damaged."""

    write: Callable[[Path, int, Position], TokenDatasetWriter]
    """Makes a writer for a prefix and a vocabulary size, at the position that another one has saved; {} is the start.

    A vocabulary size of 0 means labels, which are token ids or -100 (MASKED)."""

    open_checked: Callable[[Path], TokenDataset] | None = None
    """Opens a dataset that another process of this machine has opened; where this takes no less time, None."""

    working_suffixes: tuple[str, ...] = ()
    """Endings of the files that a writer needs beside those of the dataset."""

    def token_file(self, prefix: Path) -> Path:
        """Returns the path of the file that holds the tokens."""
        return dataset_file(prefix, self.token_suffix)

    def exists(self, prefix: Path) -> bool:
        """Tells whether all files of the format are there."""
        return all(path.is_file() for path in self.files(prefix))

    def files(self, prefix: Path) -> list[Path]:
        """Returns the paths of all files of a dataset."""
        return [dataset_file(prefix, suffix) for suffix in (self.token_suffix, *self.index_suffixes)]

    def publish(self, prefix: Path) -> None:
        """Gives the files of a dataset their names, where a process was killed after it had finished them.

        The tokens are in place before the index that makes the dataset complete.
        """
        for path in self.files(prefix):
            publish(path)

    def discard(self, prefix: Path) -> None:
        """Deletes the working files of a dataset, which no process writes any more."""
        for suffix in (self.token_suffix, *self.index_suffixes, *self.working_suffixes):
            working_path(dataset_file(prefix, suffix)).unlink(missing_ok=True)


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
