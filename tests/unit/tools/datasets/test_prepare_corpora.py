"""Corpora are downloaded from a server with the layout of the real ones, and tokenized."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megatron.data.formats.mmap import IndexedDataset
from megatron.data.prepare.corpora import CORPORA, texts_in
from megatron.errors import DataError
from megatron.io import download
from tests.helpers.file_server import FileServer, file_server
from tools.datasets.prepare_data import main


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(download, "WAIT_SECONDS", 0.0)
    with file_server() as state:
        yield state


def lines(*texts: str) -> bytes:
    content = "".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in texts)
    return zstandard.ZstdCompressor().compress(content.encode())


def run(server: FileServer, folder: Path, name: str) -> list[bytes]:
    words = ["-d", str(folder), "-t", "CharLevelTokenizer", "--base-url", server.url, name]
    assert main(words) == 0
    dataset = IndexedDataset(folder / name / f"{name}_text_document")
    return [bytes(dataset[number].astype(np.uint8)) for number in range(len(dataset))]


def test_the_pile(server: FileServer, tmp_path: Path) -> None:
    parts = {f"{number:02}.jsonl.zst": lines(f"part {number}", "é") for number in range(30)}
    server.files = {f"/train/{name}": content for name, content in parts.items()}
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  ./train/{name}\n" for name, content in parts.items())
    server.files["/SHA256SUMS.txt"] = sums.encode()
    server.break_off["/train/03.jsonl.zst"] = [20]
    expected = [text for number in range(30) for text in (f"part {number}".encode() + b"\0", "é\0".encode())]
    assert run(server, tmp_path, "pile") == expected
    before = len(server.requests)
    assert run(server, tmp_path, "pile") == expected
    assert len(server.requests) == before


def test_a_part_that_was_not_published_is_refused(server: FileServer, tmp_path: Path) -> None:
    server.files = {f"/train/{number:02}.jsonl.zst": lines("x") for number in range(30)}
    server.files["/SHA256SUMS.txt"] = f"{'0' * 64} *train/07.jsonl.zst\n".encode()
    with pytest.raises(DataError, match=rf"07\.jsonl\.zst: SHA-256 .* and {'0' * 64} is published"):
        run(server, tmp_path, "pile")
    assert not list(tmp_path.rglob("*.idx"))


def test_a_dead_source_names_the_way_out(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"00\.jsonl\.zst: the source is dead \(404 .*--base-url"):
        run(server, tmp_path, "pile")


def packed(*members: tuple[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def test_openwebtext2(server: FileServer, tmp_path: Path) -> None:
    members = [("./b.jsonl.zst", lines("second")), ("a.jsonl.zst", lines("first")), ("readme.md", b"x")]
    server.files["/openwebtext2.jsonl.zst.tar"] = packed(*members)
    assert run(server, tmp_path, "openwebtext2") == [b"first\0", b"second\0"]


@pytest.mark.parametrize("name", ["../evil.jsonl.zst", "/tmp/evil.jsonl.zst", "a/../../evil.jsonl.zst"])  # noqa: S108
def test_no_member_leaves_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.tar").write_bytes(packed((name, lines("evil"))))
    with pytest.raises(DataError, match="would lie outside of its folder"):
        texts_in(tmp_path / "in" / "x.tar")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["x.tar"]


def test_enwik8(server: FileServer, tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", "<mediawiki>é")
    server.files["/enwik8.zip"] = content.getvalue()
    assert run(server, tmp_path, "enwik8") == ["<mediawiki>é\0".encode()]


def test_archives_that_are_none_or_too_large(tmp_path: Path) -> None:
    path = tmp_path / "enwik8.zip"
    path.write_bytes(b"PK no archive")
    with pytest.raises(DataError, match="not a whole archive"):
        texts_in(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", bytes(100_000_001))
    with pytest.raises(DataError, match="would become 100,000,001 bytes"):
        texts_in(path)
    (tmp_path / "cut.tar").write_bytes(packed(("a.jsonl.zst", bytes(9000)))[:5000])
    with pytest.raises(DataError, match=r"cut\.tar: not a whole archive|not of the 9,000 bytes"):
        texts_in(tmp_path / "cut.tar")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pile"], "pile needs --tokenizer"),
        (["pile", "-t", "CharLevelTokenizer", "--text", "a.txt"], "belong to python_docs"),
        (["piles"], "invalid choice: 'piles'"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err


def test_sources_are_https() -> None:
    assert all(getattr(corpus, "base_url", "https://").startswith("https://") for corpus in CORPORA.values())
