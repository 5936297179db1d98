"""A download goes on where it was, is what was published, and says when its source is dead."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.errors import DataError
from megatron.io import download as module
from megatron.io.download import Remote, download
from tests.helpers.file_server import FileServer, file_server

CONTENT = random.Random(0).randbytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.0)
    with file_server() as state:
        state.files["/a.bin"] = CONTENT
        yield state


def get(server: FileServer, path: Path, sha256: str | None = None, name: str = "/a.bin") -> None:
    download(Remote(server.url + name, sha256, "Name a mirror."), path, lambda done, total: None)


def test_a_whole_file_is_downloaded_once(server: FileServer, tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    get(server, path, SHA256)
    get(server, path, SHA256)
    assert path.read_bytes() == CONTENT
    assert server.requests == [("/a.bin", None)]
    assert {file.name for file in path.parent.iterdir()} == {"a.bin", "a.bin.download.json"}
    path.write_bytes(CONTENT[:-1])
    get(server, path, SHA256)
    assert path.read_bytes() == CONTENT


def test_it_goes_on_where_it_broke_off(server: FileServer, tmp_path: Path) -> None:
    server.break_off["/a.bin"] = [1_000_000, 500_000]
    get(server, tmp_path / "a.bin", SHA256)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.requests == [("/a.bin", None), ("/a.bin", "bytes=1000000-"), ("/a.bin", "bytes=1500000-")]


def test_another_process_goes_on(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    server.break_off["/a.bin"] = [1_000_000]
    with pytest.raises(DataError, match=r"broke off 1 times .*Name a mirror\. The same command goes on"):
        get(server, tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.requests[-1] == ("/a.bin", "bytes=1000000-")


@pytest.mark.parametrize("trouble", ["no ranges", "changed", "all there"])
def test_what_cannot_go_on_starts_over(
    trouble: str, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    server.break_off["/a.bin"] = [1_000_000]
    with pytest.raises(DataError, match="broke off"):
        get(server, tmp_path / "a.bin")
    expected = CONTENT
    if trouble == "no ranges":
        server.ignores_ranges = True
    elif trouble == "changed":
        expected = server.files["/a.bin"] = CONTENT[::-1]
    else:
        (tmp_path / "a.bin.partial").write_bytes(CONTENT)
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == expected


def test_what_was_not_published_is_refused(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"SHA-256 {SHA256}, and {'0' * 64} is published"):
        get(server, tmp_path / "a.bin", "0" * 64)
    assert not list(tmp_path.glob("a.bin*l"))
    server.linked_hashes["/a.bin"] = "1" * 64
    with pytest.raises(DataError, match=rf"{'1' * 64} is published"):
        get(server, tmp_path / "b.bin")


def test_a_dead_source_says_what_to_do(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/gone\.bin: the source is dead \(404 .*\)\. Name a mirror\."):
        get(server, tmp_path / "a.bin", name="/gone.bin")
    with pytest.raises(DataError, match=r"broke off 5 times \(.*refused.*\)"):
        download(Remote("http://127.0.0.1:9/a.bin"), tmp_path / "a.bin", lambda done, total: None)
    assert list(tmp_path.iterdir()) == []


def test_only_https_is_downloaded(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only https is downloaded"):
        download(Remote("http://example.org/a.bin"), tmp_path / "a.bin", lambda done, total: None)
    with pytest.raises(DataError, match="only https is downloaded"):
        download(Remote("file:///etc/passwd"), tmp_path / "a.bin", lambda done, total: None)
    server.redirects["/moved.bin"] = "http://example.org/a.bin"
    with pytest.raises(DataError, match=r"http://example\.org/a\.bin: only https"):
        get(server, tmp_path / "a.bin", name="/moved.bin")
    server.redirects["/moved.bin"] = f"{server.url}/a.bin"
    get(server, tmp_path / "a.bin", SHA256, name="/moved.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_full_disk_is_told_before(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DataError, match=r"a\.bin: 3,000,000 bytes are still to come, and 1,000 are free"):
        get(server, tmp_path / "a.bin")
