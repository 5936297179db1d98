"""Documents come out whole and in order, whatever the compression, and damage is named."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from megatron.data.prepare import text_files
from megatron.data.prepare.text_files import RawDocument, read_documents, require_text_files, texts_of
from megatron.errors import DataError

TEXTS = ["first", "second\nwith a line break", "üñí 東京", "x" * 5000, ""]
JSONL = "".join(
    json.dumps({"text": text, "id": i}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(TEXTS)
).encode()


def two_frames(content: bytes) -> bytes:
    compress = zstandard.ZstdCompressor().compress
    return compress(content[:37]) + compress(content[37:])


COMPRESSED = {
    ".jsonl": lambda content: content,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.ZstdCompressor().compress,
    "_frames.jsonl.zst": two_frames,
}


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("end", [b"", b"\n \n"], ids=["", "blank lines"])
def test_lines_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, end: bytes) -> None:
    monkeypatch.setattr(text_files, "BYTES_AT_A_TIME", 50)
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(COMPRESSED[suffix](JSONL + end))
    documents = list(read_documents([path, path]))
    assert [texts_of(raw, ["text"])["text"] for raw in documents] == TEXTS * 2
    assert [raw.place for raw in documents[: len(TEXTS)]] == [f"{path}:{n}" for n in range(1, len(TEXTS) + 1)]
    assert documents[-1].bytes_read <= 2 * path.stat().st_size
    assert documents[-1].bytes_read > path.stat().st_size


def test_last_line_needs_no_line_break(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".jsonl.zst"):
        path = tmp_path / f"corpus{suffix}"
        path.write_bytes(COMPRESSED[suffix](b'{"text": "a"}\n{"text": "b"}'))
        assert [texts_of(raw, ["text"])["text"] for raw in read_documents([path])] == ["a", "b"]


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    (raw,) = read_documents([path])
    assert (raw.place, raw.bytes_read) == (str(path), 9)
    assert texts_of(raw, ["story", "other"]) == {"story": "one\n\ntwo\n"}


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_damaged_compression_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(COMPRESSED[suffix](JSONL)[:-5] if damage == "truncated" else b"not compressed at all")
    with pytest.raises(DataError, match=rf"corpus\{suffix}: damaged or truncated"):
        list(read_documents([path]))


def test_unknown_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"notes\.md: unknown kind of text file.*\.jsonl\.zst"):
        require_text_files([tmp_path / "notes.md"])
    with pytest.raises(DataError, match=r"corpus\.jsonl: no such file"):
        require_text_files([tmp_path / "corpus.jsonl"])
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match=r"folder\.txt: is not a file"):
        require_text_files([tmp_path / "folder.txt"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"text": "a"', "not JSON .*column 13"),
        (b'["a"]', "a JSON list, not an object"),
        (b'{"body": "a"}', "no key 'text'"),
        (b'{"text": 3}', "'text' is not a text"),
        (b'{"text": null}', "'text' is not a text"),
        (b'{"text": "\xff"}', "not UTF-8 .*byte 10"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_malformed_lines_say_why(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        texts_of(RawDocument(Path("corpus.jsonl"), 7, content, 0), ["text"])
