"""Reads raw documents from text files: one per line of .jsonl, plain or compressed; one per .txt file."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from megatron.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
BYTES_AT_A_TIME = 1 << 20
"""Compressed bytes that are read at once."""


@dataclass(frozen=True)
class RawDocument:
    """The undecoded content of one document, and its place in the input."""

    path: Path
    line: int | None
    """Line of a .jsonl file, from 1; None for a .txt file, which is a document as a whole."""

    content: bytes
    bytes_read: int
    """Position of the reader in all files together, as they lie on disk [bytes]."""

    @property
    def place(self) -> str:
        """Returns the place as file:line, for messages."""
        return str(self.path) if self.line is None else f"{self.path}:{self.line}"


def require_text_files(paths: Sequence[Path]) -> None:
    """Raises DataError unless every path is a file of a known kind."""
    for path in paths:
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: unknown kind of text file. Known endings: {', '.join(SUFFIXES)}.")
        if not path.is_file():
            raise DataError(f"{path}: {'is not a file' if path.exists() else 'no such file'}.")


def read_documents(paths: Sequence[Path]) -> Iterator[RawDocument]:
    """Yields the documents of all files, in order; blank lines of .jsonl files are left out. Holds one line in memory.

    Raises DataError when compressed data is damaged or ends early.
    """
    finished = 0
    for path in paths:
        with path.open("rb") as file:
            if path.suffix == ".txt":
                yield RawDocument(path, None, file.read(), finished + file.tell())
            else:
                for number, line in enumerate(_lines(path, file), start=1):
                    if line.strip():
                        yield RawDocument(path, number, line.rstrip(b"\r\n"), finished + file.tell())
            finished += file.tell()


def texts_of(raw: RawDocument, keys: Sequence[str]) -> dict[str, str]:
    """Decodes the texts of a .jsonl line by key, or a whole .txt file under the first key.

    Raises ValueError, with the reason, when the document is malformed.
    """
    try:
        text = raw.content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    if raw.line is None:
        return {keys[0]: text}
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"a JSON {type(values).__name__}, not an object")
    for key in keys:
        if not isinstance(values.get(key), str):
            raise ValueError(f"{key!r} is not a text" if key in values else f"no key {key!r}")
        try:
            values[key].encode()
        except UnicodeEncodeError:
            raise ValueError(f"{key!r} holds half of a surrogate pair") from None
    return {key: values[key] for key in keys}


def _lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    try:
        if path.suffix == ".gz":
            with gzip.open(file) as lines:
                yield from lines
        elif path.suffix == ".zst":
            yield from _split_lines(_decompressed(file))
        else:
            yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}: damaged or truncated ({error}). Copy or download it again.") from error


def _decompressed(file: BinaryIO) -> Iterator[bytes]:
    """Decompresses one or more zstd frames.

    Raises EOFError when a frame is truncated, which zstandard's own stream reader takes for complete.
    """
    decompressor = zstandard.ZstdDecompressor()
    frame = None
    while compressed := file.read(BYTES_AT_A_TIME):
        while compressed:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(compressed)
            compressed = b""
            if frame.eof:
                compressed, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("a zstd frame ends early")


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pending.append(first)
        for start in others:
            yield b"".join(pending)
            pending = [start]
    yield b"".join(pending)
