"""Keeps sample indices on disk: built once, then memory-mapped by every rank and every later run."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import time
import tokenize
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from megatron.data.order.sample_index import IndexExtent, SampleIndex, build_sample_index, index_extent
from megatron.errors import DataError
from megatron.io.durable import atomic_write, file_lock
from megatron.io.hashing import HashingWriter, file_sha256
from megatron.io.json_files import read_json_object

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1
MALFORMED_NPY = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RecursionError,
    EOFError,
    SyntaxError,
    tokenize.TokenError,
    struct.error,
)
"""Errors of NumPy on the header of a damaged .npy file, which is a Python literal that it parses, and mends before."""


def cached_sample_index(
    sizes: npt.NDArray[np.integer],
    documents: range,
    num_samples: int,
    seq_length: int,
    seed: int,
    *,
    folder: Path,
    name: str,
    checked_key: str | None = None,
) -> tuple[SampleIndex, str]:
    """Loads the result of `build_sample_index` from .npy files in `folder`, or builds and saves it; returns its key.

    The arrays returned are memory maps. The file names carry the key, a hash of everything that the index is computed
    from, so data that was tokenized again never meets an old order. Ranks that race build it once and then share it.
    Files that are not what was written are built again: their hashes are compared, unless another process of this
    machine has done so and gives the key (`checked_key`). Raises DataError like `build_sample_index`, and when the
    folder cannot be written.
    """
    extent = index_extent(sizes, documents, num_samples, seq_length)
    key = checked_key or _key(sizes, documents, extent.num_epochs, seq_length, seed)
    files = _IndexFiles(folder / f"{name}_{key}", extent)
    # Another process may be writing these very files, so what looks damaged here is judged under the lock.
    cached = files.load(hashes=checked_key is None, report=False)
    if cached is not None:
        return cached, key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(files.lock):
            cached = files.load(hashes=True, report=True)
            if cached is None:
                started = time.perf_counter()
                files.build(sizes, documents, num_samples, seq_length, seed)
                logger.info("%s: sample index built in %.1f s", files.stem, time.perf_counter() - started)
                cached = files.load(hashes=False, report=True)
    except OSError as error:
        raise DataError(
            f"{folder}: the sample index cannot be written ({error.strerror}). Set index_cache_dir to a folder with "
            "room that you may write."
        ) from error
    if cached is None:
        raise DataError(f"{files.stem}: the sample index cannot be read back after writing; check the disk.")
    return cached, key


def _key(sizes: npt.NDArray[np.integer], documents: range, num_epochs: int, seq_length: int, seed: int) -> str:
    """Hashes what decides the index: sizes and range of the documents, epochs, sample length, seed."""
    facts = (_FORMAT_VERSION, sizes.dtype.str, documents.start, documents.stop, num_epochs, seq_length, seed)
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=12)
    digest.update(np.ascontiguousarray(sizes[documents.start : documents.stop]).data)
    return digest.hexdigest()


class _IndexFiles:
    """The .npy files of one index, a file for each of its arrays, and one with their hashes."""

    def __init__(self, stem: Path, extent: IndexExtent) -> None:
        self.stem = stem
        self.extent = extent
        self.lock = stem.with_name(f"{stem.name}.lock")
        self.hashes = stem.with_name(f"{stem.name}_hashes.json")

    def _path(self, part: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}_{part}.npy")

    def build(
        self, sizes: npt.NDArray[np.integer], documents: range, num_samples: int, seq_length: int, seed: int
    ) -> None:
        """Builds and writes all arrays: each is hashed and written while the next one is built.

        Raises OSError where the disk is full, DataError where the folder cannot be written.
        """
        self.hashes.unlink(missing_ok=True)
        digests: dict[str, Future[str]] = {}
        with ThreadPoolExecutor(1) as writer:

            def write(part: str, array: npt.NDArray[np.integer]) -> None:
                digests[part] = writer.submit(self._write, part, array)

            build_sample_index(sizes, documents, num_samples, seq_length, seed, on_array=write)
        with atomic_write(self.hashes) as temporary:
            temporary.write_text(json.dumps({part: digest.result() for part, digest in digests.items()}) + "\n")

    def _write(self, part: str, array: npt.NDArray[np.integer]) -> str:
        """Writes a contiguous array as np.save does; returns the SHA-256 of the file."""
        with atomic_write(self._path(part)) as temporary, temporary.open("wb") as file:
            hashing = HashingWriter(file)
            np.lib.format.write_array_header_1_0(cast(Any, hashing), np.lib.format.header_data_from_array_1_0(array))
            # In one piece: NumPy's shuffle, which goes on meanwhile, lets no other thread of Python take its turn.
            hashing.write(array.data.cast("B"))
        return hashing.sha256

    def load(self, *, hashes: bool, report: bool) -> SampleIndex | None:
        """Maps the index; None when a file is missing or damaged. `report` logs damage. `hashes` reads all of it."""
        paths = [self._path(field.name) for field in fields(SampleIndex)]
        if not all(path.is_file() for path in paths):
            return None
        try:
            # open_memmap reads .npy alone and refuses pickled objects, whatever the file holds.
            index = SampleIndex(*(np.lib.format.open_memmap(path, mode="r").view(np.ndarray) for path in paths))
            self._check(index)
            if hashes:
                self._check_hashes()
        except (OSError, *MALFORMED_NPY) as error:
            if report:
                logger.warning("%s: the sample index there is damaged (%s) and is built again", self.stem, error)
            return None
        return index

    def _check(self, index: SampleIndex) -> None:
        """Raises ValueError unless the arrays have the sizes and types of this index."""
        extent = self.extent
        expected = {
            "doc_idx": ((extent.num_entries,), extent.types.doc),
            "sample_idx": ((extent.num_samples + 1, 2), extent.types.sample),
            "shuffle_idx": ((extent.num_samples,), extent.types.shuffle),
        }
        for name, array in vars(index).items():
            shape, dtype = expected[name]
            if array.shape != shape or array.dtype != np.dtype(dtype):
                raise ValueError(f"{name} is {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}")

    def _check_hashes(self) -> None:
        """Raises ValueError or OSError unless every file has the hash that was noted when it was written."""
        noted = read_json_object(self.hashes)
        parts = [field.name for field in fields(SampleIndex)]
        with ThreadPoolExecutor(len(parts)) as pool:  # hashing leaves the other threads of Python alone
            found = list(pool.map(lambda part: file_sha256(self._path(part)), parts))
        for part, sha256 in zip(parts, found, strict=True):
            if noted.get(part) != sha256:
                raise ValueError(f"{part} is not what was written")
