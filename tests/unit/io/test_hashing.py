"""Digests against hashlib's own of the same bytes."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from megatron.io.hashing import HashingWriter, file_sha256, sampled_sha256


def test_a_file_and_what_is_being_written_have_the_digest_of_their_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 3000
    (tmp_path / "file").write_bytes(content)
    buffer = io.BytesIO()
    writer = HashingWriter(buffer)
    for start in range(0, len(content), 1000):
        writer.write(content[start : start + 1000])
    writer.flush()
    assert buffer.getvalue() == content
    assert writer.size == len(content)
    assert file_sha256(tmp_path / "file") == writer.sha256 == hashlib.sha256(content).hexdigest()


def test_a_sample_sees_both_ends_and_repeats_a_file_that_is_shorter_than_a_piece(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = bytearray(10_000_000)
    path.write_bytes(content)
    before = sampled_sha256(path)
    for position in (0, len(content) - 1):
        changed = content.copy()
        changed[position] = 1
        path.write_bytes(changed)
        assert sampled_sha256(path) != before
    path.write_bytes(b"short")
    assert sampled_sha256(path) == hashlib.sha256(b"short" * 64).hexdigest()
