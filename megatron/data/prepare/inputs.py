"""Finds the inputs that a user names: files, folders and patterns."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from megatron.config.local_path import url_remedy
from megatron.data.prepare.documents import Input
from megatron.data.prepare.tables import PARQUET, ParquetFile, SavedDataset
from megatron.data.prepare.text_files import SUFFIXES, TextFile
from megatron.errors import ConfigError, DataError

_KNOWN = (*SUFFIXES, PARQUET)


def find_inputs(words: Sequence[str]) -> list[Input]:
    """Returns the inputs in the order of `words`; what a pattern or folder holds is sorted by path.

    A word is a file, a folder, a pattern such as `data/*.jsonl.zst`, or several of them with commas; one whose own name
    has a comma is taken whole. Raises ConfigError for a URL, DataError for what is missing or of an unknown kind.
    """
    inputs: list[Input] = []
    for word in words:
        if remedy := url_remedy(word):
            raise ConfigError(f"--input {word}: expected files on this machine{remedy}.")
        parts = [word] if Path(word).exists() else [part.strip() for part in word.split(",")]
        for part in parts:
            inputs += [input_at(path) for path in _paths(part)]
    return inputs


def input_at(path: Path) -> Input:
    """Returns the input at one path. Raises DataError when it is missing or of an unknown kind."""
    if path.is_dir() and _is_saved_dataset(path):
        return SavedDataset(path)
    if path.name.endswith(PARQUET):
        return ParquetFile(path)
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of input. Known endings: {', '.join(_KNOWN)}.")
    return TextFile(path)


def _paths(word: str) -> list[Path]:
    path = Path(word)
    if path.is_dir() and not _is_saved_dataset(path):
        found = sorted(file for file in path.rglob("*") if file.name.endswith(_KNOWN) and file.is_file())
        if not found:
            raise DataError(f"{path}: no file in this folder ends with {', '.join(_KNOWN)}.")
        return found
    if path.exists() or not glob.has_magic(word):
        return [path]
    matches = sorted(map(Path, glob.glob(word, recursive=True)))  # noqa: PTH207 - absolute patterns too
    if not matches:
        raise DataError(f"{word}: no file matches this pattern.")
    return [file for match in matches for file in (_paths(str(match)) if match.is_dir() else [match])]


def _is_saved_dataset(path: Path) -> bool:
    return any((path / mark).is_file() for mark in SavedDataset.MARKS)
