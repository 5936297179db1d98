"""Reads documents from the rows of tables: Parquet files and datasets of Hugging Face's library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.data.prepare.documents import Limits, RawDocument
from megatron.errors import DataError, os_errors_as
from megatron.io.hashing import file_sha256, sampled_sha256
from megatron.registry import install_extra, require

PARQUET = ".parquet"
_ROWS_AT_A_TIME = 64


class ParquetFile:
    """A Parquet file; its row groups are read piece by piece."""

    unit = "row"

    def __init__(self, path: Path) -> None:
        """Looks the file up. Raises DataError when it is missing, EnvironmentSetupError without pyarrow."""
        if not path.is_file():
            raise DataError(f"{path}: {'is not a file' if path.exists() else 'no such file'}.")
        require("pyarrow", f"Reading {path.name}", install_extra("data"))
        self.path = path
        self.name = str(path)
        self.size = path.stat().st_size

    def identity(self) -> dict[str, Any]:
        """Returns name, size and a hash of pieces."""
        with os_errors_as(DataError, self.name):
            return {"name": self.path.name, "size": self.size, "sampled_sha256": sampled_sha256(self.path)}

    def read(self, keys: Sequence[str], after: int, limits: Limits) -> Iterator[RawDocument]:
        """Yields the rows above `after`. Raises DataError when a column is missing or the file is damaged."""
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
                _require_columns(self.name, keys, file.schema_arrow.names)
                first, groups = 0, list(range(file.metadata.num_row_groups))
                while groups and first + file.metadata.row_group(groups[0]).num_rows <= after:
                    first += file.metadata.row_group(groups.pop(0)).num_rows
                total, number = max(file.metadata.num_rows, 1), first
                for batch in file.iter_batches(_ROWS_AT_A_TIME, row_groups=groups, columns=list(keys)):
                    if number + len(batch) > after:
                        skipped = max(after - number, 0)
                        for row, values in enumerate(batch.slice(skipped).to_pylist(), start=number + skipped + 1):
                            yield RawDocument(row, values, self.size * row // total)
                    number += len(batch)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: not a whole Parquet file ({error}). Copy or download it again.") from error

    def sha256(self) -> str:
        """Returns the hash of the whole file."""
        with os_errors_as(DataError, self.name):
            return file_sha256(self.path)


class SavedDataset:
    """A folder that `save_to_disk` of Hugging Face's datasets has written; memory-mapped."""

    unit = "row"
    MARKS = ("dataset_info.json", "dataset_dict.json")

    def __init__(self, path: Path) -> None:
        """Opens the dataset. Raises DataError when it is damaged or has several splits."""
        self.path = path
        self.name = str(path)
        library = require("datasets", f"Reading {path}", install_extra("data"))
        try:
            loaded = library.load_from_disk(str(path), keep_in_memory=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a whole saved dataset ({error}). Copy it again.") from error
        if isinstance(loaded, dict):
            if len(loaded) != 1:
                raise DataError(f"{path}: has the splits {', '.join(loaded)}. Name one: {path / next(iter(loaded))}.")
            (loaded,) = loaded.values()
        self._rows = loaded
        self._files = sorted(file for file in path.rglob("*") if file.is_file())
        self.size = sum(file.stat().st_size for file in self._files)

    def identity(self) -> dict[str, Any]:
        """Returns name, size, number of rows and the library's own fingerprint."""
        return {"name": self.path.name, "size": self.size, "rows": len(self._rows), "print": self._rows._fingerprint}

    def read(self, keys: Sequence[str], after: int, limits: Limits) -> Iterator[RawDocument]:
        """Yields the rows above `after`. Raises DataError when a column is missing."""
        _require_columns(self.name, keys, self._rows.column_names)
        rows = self._rows.select_columns(list(keys)).with_format("arrow")
        total = max(len(rows), 1)
        for start in range(max(after, 0), len(rows), _ROWS_AT_A_TIME):
            for row, values in enumerate(rows[start : start + _ROWS_AT_A_TIME].to_pylist(), start=start + 1):
                yield RawDocument(row, values, self.size * row // total)

    def sha256(self) -> str:
        """Returns a hash of the hashes of all files."""
        digest = hashlib.sha256()
        with os_errors_as(DataError, self.name):
            for file in self._files:
                digest.update(f"{file.relative_to(self.path)} {file_sha256(file)}\n".encode())
        return digest.hexdigest()


class HubDataset:
    """A dataset that Hugging Face's library knows by name, streamed; needs the network, or the library's cache."""

    unit = "row"
    size = 0

    def __init__(self, name: str, config: str | None, split: str) -> None:
        """Looks the dataset up. Raises DataError when it cannot be reached."""
        self.name = "/".join(filter(None, (name, config, split)))
        library = require("datasets", f"--hf-dataset {name}", install_extra("data"))
        try:
            self._rows = library.load_dataset(name, config, split=split, streaming=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise DataError(
                f"--hf-dataset {self.name}: cannot be opened ({error}). Look at its name, --hf-config and --hf-split, "
                "and at the network; or save it on disk elsewhere (save_to_disk), and give the folder as --input."
            ) from error

    def identity(self) -> dict[str, Any]:
        """Returns the name, and the sources with their revisions."""
        info = self._rows.info
        return {"name": self.name, "sources": sorted(info.download_checksums or {}), "version": str(info.version)}

    def read(self, keys: Sequence[str], after: int, limits: Limits) -> Iterator[RawDocument]:
        """Yields the rows above `after`. Raises DataError when a column is missing or the source breaks off."""
        if self._rows.column_names is not None:
            _require_columns(self.name, keys, self._rows.column_names)
        try:
            for row, values in enumerate(self._rows.skip(max(after, 0)), start=max(after, 0) + 1):
                yield RawDocument(row, {key: values[key] for key in keys if key in values}, 0)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{self.name}: broke off ({error}). Run it again: it goes on where it was.") from error

    def sha256(self) -> str:
        """Returns nothing: what is streamed has no file to be hashed."""
        return ""


def _require_columns(name: str, keys: Sequence[str], columns: Sequence[str]) -> None:
    for key in keys:
        if key not in columns:
            raise DataError(f"{name}: no column {key!r}; it has {', '.join(columns)}. Choose with --jsonl-keys.")
