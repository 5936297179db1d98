"""Reads documents from text files: one per line of .jsonl, plain or compressed; one per .txt file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.data.prepare.documents import Limits, RawDocument
from megatron.data.prepare.lines import read_lines
from megatron.errors import DataError, os_errors_as
from megatron.io.hashing import HashingReader, sampled_sha256

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
_WHOLE_FILE_BYTES = 1 << 20


class TextFile:
    """A .jsonl file, plain or compressed, or a .txt file."""

    def __init__(self, path: Path) -> None:
        """Looks the file up. Raises DataError when it is missing, or not of a known kind."""
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: unknown kind of text file. Known endings: {', '.join(SUFFIXES)}.")
        if not path.is_file():
            raise DataError(f"{path}: {'is not a file' if path.exists() else 'no such file'}.")
        self.path = path
        self.name = str(path)
        self.size = path.stat().st_size
        self.unit = "" if path.suffix == ".txt" else "line"
        self._sha256 = ""

    def identity(self) -> dict[str, Any]:
        """Returns name, size and a hash of pieces."""
        with os_errors_as(DataError, self.name):
            return {"name": self.path.name, "size": self.size, "sampled_sha256": sampled_sha256(self.path)}

    def read(self, keys: Sequence[str], after: int, limits: Limits) -> Iterator[RawDocument]:
        """Yields the lines with numbers above `after` that are not blank, or the whole file as one document.

        Raises DataError when compressed data is damaged or ends early.
        """
        with os_errors_as(DataError, self.name), self.path.open("rb") as opened:
            file = HashingReader(opened)
            if self.unit == "":
                content: bytes | None = file.read(limits.max_line_bytes + 1)
                if content is not None and len(content) > limits.max_line_bytes:
                    content = None
                    while file.read(_WHOLE_FILE_BYTES):
                        pass
                if after < 0:
                    yield RawDocument(0, content, file.size)
            else:
                lines = read_lines(
                    self.path, file, max_line_bytes=limits.max_line_bytes, max_expansion=limits.max_expansion
                )
                for number, line in enumerate(lines, start=1):
                    if number > after and (line is None or not line.isspace()) and line != b"":
                        yield RawDocument(number, None if line is None else line.rstrip(b"\r"), file.size)
            self._sha256 = file.sha256

    def sha256(self) -> str:
        """Returns the hash of the whole file, which has been read."""
        return self._sha256
