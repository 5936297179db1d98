"""Looks through a whole dataset for what a start of training has no time to look at."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.data.dataset_format import MASKED
from megatron.data.dataset_manifest import Manifest, manifest_file, read_manifest
from megatron.data.formats.mmap import IndexedDataset, index_file
from megatron.errors import DataError
from megatron.io.hashing import file_sha256


@dataclass(frozen=True)
class Expected:
    """Facts that the user gives, where no manifest has them."""

    vocab_size: int | None = None
    eod: int | None = None
    """Token that ends each document."""
    sha256: str | None = None
    """Of the token file."""


def problems_of(prefix: Path, expected: Expected) -> Iterator[str]:
    """Yields what is wrong with a dataset, a line each; nothing when it is whole."""
    try:
        manifest = read_manifest(prefix)
    except DataError as error:
        yield str(error)
        manifest = None
    if manifest is not None and not manifest.files:
        return  # the part of a sharded run that had no document
    try:
        dataset = IndexedDataset(prefix)
    except DataError as error:
        yield str(error)
        return
    yield from _index_problems(dataset)
    vocab_size, eod, is_labels = expected.vocab_size, expected.eod, False
    if manifest is not None and manifest.tokenizer is not None:
        vocab_size = vocab_size if vocab_size is not None else manifest.tokenizer.vocab_size
        is_labels = manifest.kind == "labels"
        eod = manifest.tokenizer.eod if eod is None and manifest.append_eod and not is_labels else eod
    digest = hashlib.sha256()
    shown = {"id": False, "eod": False}
    for first, tokens, lengths in dataset.blocks():
        digest.update(tokens.data)
        if vocab_size is not None and not shown["id"]:
            wrong = (tokens.astype(np.int64) >= vocab_size) | ((tokens < 0) & ~(is_labels & (tokens == MASKED)))
            for message in _first(dataset, first, lengths, wrong, tokens):
                shown["id"] = True
                yield f"{message}; the vocabulary ends at {vocab_size - 1}"
        if eod is not None and not shown["eod"]:
            ends = np.cumsum(lengths)
            unended = np.flatnonzero((lengths == 0) | (tokens[np.maximum(ends - 1, 0)] != eod))
            if len(unended):
                shown["eod"] = True
                yield (
                    f"{dataset.token_file}: document {first + int(unended[0]):,} does not end with the end-of-document "
                    f"token {eod}"
                )
    yield from _hash_problems(dataset, digest.hexdigest(), manifest, expected)


def _first(
    dataset: IndexedDataset,
    first: int,
    lengths: npt.NDArray[np.int64],
    wrong: npt.NDArray[np.bool_],
    tokens: npt.NDArray[np.integer],
) -> Iterator[str]:
    """Describes the first wrong token of a block, if there is one."""
    if wrong.any():
        position = int(wrong.argmax())
        document = int(np.searchsorted(np.cumsum(lengths), position, side="right"))
        offset = position - int(lengths[:document].sum())
        yield (
            f"{dataset.token_file}: document {first + document:,} holds the token id {int(tokens[position])} at token "
            f"{offset:,}"
        )


def _index_problems(dataset: IndexedDataset) -> Iterator[str]:
    indices = dataset.document_indices
    bounded = len(indices) and indices[0] == 0 and indices[-1] == len(dataset)
    if not bounded or (indices[1:] < indices[:-1]).any():
        yield f"{index_file(dataset.prefix)}: the documents' first sequences do not rise from 0 to {len(dataset):,}"
    if len(dataset) == 0:
        yield f"{index_file(dataset.prefix)}: no document"


def _hash_problems(
    dataset: IndexedDataset, sha256: str, manifest: Manifest | None, expected: Expected
) -> Iterator[str]:
    if expected.sha256 is not None and sha256 != expected.sha256.lower():
        yield f"{dataset.token_file}: SHA-256 {sha256}, not {expected.sha256.lower()}"
    if manifest is None:
        return
    name = manifest_file(dataset.prefix).name
    actual = {".bin": (dataset.token_file, sha256)}
    actual[".idx"] = (index_file(dataset.prefix), file_sha256(index_file(dataset.prefix)))
    for suffix, (path, found) in actual.items():
        if suffix in manifest.files and manifest.files[suffix].sha256 != found:
            yield f"{path}: SHA-256 {found}, {name} says {manifest.files[suffix].sha256}"
    counts = (len(dataset), int(dataset.sizes.sum(dtype=np.int64)))
    if counts != (manifest.documents, manifest.tokens):
        yield (
            f"{dataset.prefix}: {counts[0]:,} documents and {counts[1]:,} tokens, {name} says "
            f"{manifest.documents:,} and {manifest.tokens:,}"
        )
