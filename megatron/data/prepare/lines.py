"""Cuts plain and compressed files into lines, in memory that no input can exceed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import zstandard

from megatron.errors import DataError

BYTES_AT_A_TIME = 1 << 20
"""Bytes that are read or decompressed at once."""
_ZSTD_BYTES_AT_A_TIME = 1 << 11
"""zstandard decompresses all that it is given: at most 32,768 times as much, here 64 MB."""
_FREE_EXPANSION = 1 << 26
"""Decompressed bytes below which no ratio is looked at."""
_GZIP = 31  # window bits of zlib for a gzip member


class Readable(Protocol):
    """A binary file."""

    def read(self, size: int, /) -> bytes:
        """Reads at most `size` bytes; none at the end."""


def read_lines(path: Path, file: Readable, *, max_line_bytes: int, max_expansion: float) -> Iterator[bytes | None]:
    """Yields the lines of a file, decompressed by its ending, without their breaks; None for one that is too long.

    Raises DataError when compressed data is damaged, ends early, or becomes more than `max_expansion` times as large.
    """
    try:
        if path.suffix == ".gz":
            chunks = _bounded(path, _gunzip(file), max_expansion)
        elif path.suffix == ".zst":
            chunks = _bounded(path, _unzstd(file), max_expansion)
        else:
            chunks = iter(lambda: file.read(BYTES_AT_A_TIME), b"")
        yield from _split(chunks, max_line_bytes)
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}: damaged or truncated ({error}). Copy or download it again.") from error


Piece = tuple[int, bytes]
"""Compressed bytes that were read so far, and what came out of the last ones."""


def _bounded(path: Path, pieces: Iterator[Piece], max_expansion: float) -> Iterator[bytes]:
    expanded = 0
    for read, chunk in pieces:
        expanded += len(chunk)
        if expanded > max(_FREE_EXPANSION, max_expansion * read):
            raise DataError(
                f"{path}: {read:,} bytes have become {expanded:,}, more than {max_expansion:g} times as many, as in a "
                "decompression bomb. If the file is right, raise --max-expansion."
            )
        for start in range(0, len(chunk), BYTES_AT_A_TIME):
            yield chunk[start : start + BYTES_AT_A_TIME]


def _gunzip(file: Readable) -> Iterator[Piece]:
    """Decompresses the members of a gzip file, with zeros between and after them. Raises EOFError when one is cut."""
    member = None
    read = 0
    while compressed := file.read(BYTES_AT_A_TIME):
        read += len(compressed)
        while compressed:
            if member is None:
                compressed = compressed.lstrip(b"\0") if read > len(compressed) or compressed[0] else compressed
                if not compressed:
                    break
                member = zlib.decompressobj(_GZIP)
            yield read, member.decompress(compressed, BYTES_AT_A_TIME)
            compressed = member.unused_data if member.eof else member.unconsumed_tail
            if member.eof:
                member = None
                compressed = compressed.lstrip(b"\0")
    if member is not None or not read:
        raise EOFError("a gzip member ends early")


def _unzstd(file: Readable) -> Iterator[Piece]:
    """Decompresses one or more zstd frames.

    Raises EOFError when a frame is truncated, which zstandard's own stream reader takes for complete.
    """
    decompressor = zstandard.ZstdDecompressor()
    frame = None
    read = 0
    while block := file.read(BYTES_AT_A_TIME):
        for start in range(0, len(block), _ZSTD_BYTES_AT_A_TIME):
            compressed = block[start : start + _ZSTD_BYTES_AT_A_TIME]
            read += len(compressed)
            while compressed:
                frame = frame or decompressor.decompressobj()
                yield read, frame.decompress(compressed)
                compressed = b""
                if frame.eof:
                    compressed, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("a zstd frame ends early")


def _split(chunks: Iterator[bytes], max_line_bytes: int) -> Iterator[bytes | None]:
    pending: list[bytes] = []
    size = 0
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pending.append(first)
        size += len(first)
        if others:
            yield _joined(pending, size, max_line_bytes)
            *whole, last = others
            yield from whole if len(chunk) <= max_line_bytes else (_joined([x], len(x), max_line_bytes) for x in whole)
            pending, size = [last], len(last)
        if size > max_line_bytes:
            pending = []
    yield _joined(pending, size, max_line_bytes)


def _joined(pending: list[bytes], size: int, max_line_bytes: int) -> bytes | None:
    return b"".join(pending) if size <= max_line_bytes else None
