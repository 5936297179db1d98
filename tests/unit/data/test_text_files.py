"""Documents come out whole and in order, whatever the compression, and damage is named."""

import gzip
import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from megatron.data.prepare import lines
from megatron.data.prepare.documents import Limits, RawDocument, place, texts_of
from megatron.data.prepare.inputs import find_inputs
from megatron.data.prepare.text_files import TextFile
from megatron.errors import ConfigError, DataError

TEXTS = ["first", "second\nwith a line break", "üñí 東京", "x" * 5000, ""]
JSONL = "".join(
    json.dumps({"text": text, "id": i}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(TEXTS)
).encode()


def two_frames(content: bytes) -> bytes:
    compress = zstandard.ZstdCompressor().compress
    return compress(content[:37]) + compress(content[37:])


def read_documents(path: Path, limits: Limits | None = None) -> list[RawDocument]:
    return list(TextFile(path).read(["text"], -1, limits or Limits()))


COMPRESSED = {
    ".jsonl": lambda content: content,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.ZstdCompressor().compress,
    "_frames.jsonl.zst": two_frames,
}


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("end", [b"", b"\n \n"], ids=["", "blank lines"])
def test_lines_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, end: bytes) -> None:
    monkeypatch.setattr(lines, "BYTES_AT_A_TIME", 50)
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(COMPRESSED[suffix](JSONL + end))
    documents = read_documents(path)
    assert [texts_of(raw, ["text"])["text"] for raw in documents] == TEXTS
    source = TextFile(path)
    places = [place(source, raw.number) for raw in documents]
    assert places == [f"{path}:{n}" for n in range(1, len(TEXTS) + 1)]
    assert 0 < documents[0].bytes_read <= documents[-1].bytes_read <= path.stat().st_size
    assert [raw.number for raw in source.read(["text"], 3, Limits())] == [4, 5]
    assert source.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_last_line_needs_no_line_break(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".jsonl.zst"):
        path = tmp_path / f"corpus{suffix}"
        path.write_bytes(COMPRESSED[suffix](b'{"text": "a"}\n{"text": "b"}'))
        assert [texts_of(raw, ["text"])["text"] for raw in read_documents(path)] == ["a", "b"]


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    (raw,) = read_documents(path)
    assert (place(TextFile(path), raw.number), raw.bytes_read) == (str(path), 9)
    assert list(TextFile(path).read(["text"], 0, Limits())) == []
    assert texts_of(raw, ["story", "other"]) == {"story": "one\n\ntwo\n"}


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_damaged_compression_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(COMPRESSED[suffix](JSONL)[:-5] if damage == "truncated" else b"not compressed at all")
    with pytest.raises(DataError, match=rf"corpus\{suffix}: damaged or truncated"):
        read_documents(path)


def test_unknown_and_missing_files_are_named(tmp_path: Path) -> None:
    for path, message in {
        tmp_path / "notes.md": r"notes\.md: unknown kind of input.*\.jsonl\.zst.*\.parquet",
        tmp_path / "corpus.jsonl": r"corpus\.jsonl: no such file",
        tmp_path / "*.jsonl": r"\*\.jsonl: no file matches",
        tmp_path: r"no file in this folder ends with",
    }.items():
        with pytest.raises(DataError, match=message):
            find_inputs([str(path)])
    with pytest.raises(ConfigError, match="s3:// is not supported"):
        find_inputs(["s3://bucket/a.jsonl"])


def test_folders_and_patterns_are_sorted(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/d.txt", "a/c.jsonl.gz", "a/notes.md", "x,y.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(*words: str) -> list[str]:
        return [str(Path(source.name).relative_to(tmp_path)) for source in find_inputs(words)]

    whole = ["a/c.jsonl.gz", "a/d.txt", "b.jsonl", "x,y.jsonl"]
    assert names(str(tmp_path)) == whole
    assert names(f"{tmp_path}/**/*.[jt]*[lt]", f"{tmp_path}/a") == ["a/d.txt", "b.jsonl", "x,y.jsonl", *whole[:2]]
    assert names(f"{tmp_path}/x,y.jsonl", f"{tmp_path}/b.jsonl, {tmp_path}/a/d.txt") == [
        "x,y.jsonl",
        "b.jsonl",
        "a/d.txt",
    ]


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_line_beyond_the_limit_is_passed_over(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(COMPRESSED[suffix](b"a\n" + b"x" * 3_000_000 + b"\nb\n" + b"y" * 100))
    read = read_documents(path, Limits(max_line_bytes=99))
    assert [(raw.number, raw.content) for raw in read] == [(1, b"a"), (2, None), (3, b"b"), (4, None)]
    with pytest.raises(ValueError, match="longer than --max-line-bytes"):
        texts_of(read[1], ["text"])


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("byte", [b" ", b"\n"], ids=["one line", "blank lines"])
def test_bombs_are_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, byte: bytes) -> None:
    monkeypatch.setattr(lines, "_FREE_EXPANSION", 1 << 20)
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(COMPRESSED[suffix](byte * 10_000_000))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"more than 100 times as many, as in a decompression bomb"):
        read_documents(path, Limits(max_line_bytes=1 << 20, max_expansion=100))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150_000_000


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
        texts_of(RawDocument(7, content, 0), ["text"])
