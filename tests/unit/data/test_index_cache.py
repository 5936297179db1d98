"""Cached indices equal built ones, are built once, and never serve other data."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from megatron.data.order import index_cache
from megatron.data.order.index_cache import cached_sample_index
from megatron.data.order.sample_index import build_sample_index
from megatron.errors import DataError
from tests.helpers.index_requests import REQUEST, SIZES, assert_right, read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    assert_right(read(path))
    return path


def test_second_reader_maps_the_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "build_sample_index", None)
    index = read(folder)
    assert_right(index)
    assert all(isinstance(array.base, np.memmap) for array in vars(index).values())
    assert not list(folder.glob("*.tmp"))


def test_more_samples_of_the_same_epochs_share_an_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "build_sample_index", None)
    assert_right(read(folder, request=(range(5, 50), 401, 8, 11)))


@pytest.mark.parametrize(
    ("sizes", "request_"),
    [
        (SIZES[::-1].copy(), REQUEST),
        (SIZES, (range(4, 50), 400, 8, 11)),
        (SIZES, (range(5, 50), 400, 9, 11)),
        (SIZES, (range(5, 50), 400, 8, 12)),
        (SIZES, (range(5, 50), 4000, 8, 11)),
    ],
    ids=["sizes", "documents", "sequence length", "seed", "epochs"],
)
def test_other_requests_get_their_own_index(
    folder: Path, sizes: npt.NDArray[np.integer], request_: tuple[range, int, int, int]
) -> None:
    index = read(folder, sizes, request_)
    want = build_sample_index(sizes, *request_)
    np.testing.assert_array_equal(index.shuffle_idx, want.shuffle_idx)
    np.testing.assert_array_equal(index.sample_idx, want.sample_idx)
    assert len(list(folder.glob("*.npy"))) == 6


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("a cache file was unpickled",))


def _pickled(path: Path) -> None:
    np.save(path, np.array([Bomb()], dtype=object), allow_pickle=True)


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _of_another_index(path: Path) -> None:
    np.save(path, np.zeros((3, 2), dtype=np.int32))


def _flipped(path: Path) -> None:
    """One bit of a value that stays in range."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("part", ["doc_idx", "sample_idx", "shuffle_idx"])
def test_a_changed_order_is_built_again(folder: Path, part: str, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = folder.glob(f"*_{part}.npy")
    _flipped(path)
    assert_right(read(folder))
    assert f"{part} is not what was written" in caplog.text


def test_files_without_hashes_are_built_again(folder: Path) -> None:
    (hashes,) = folder.glob("*_hashes.json")
    hashes.unlink()
    (path,) = folder.glob("*_shuffle_idx.npy")
    _flipped(path)
    assert_right(read(folder))
    assert hashes.exists()


def test_what_another_process_has_checked_is_only_mapped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, key = cached_sample_index(SIZES, *REQUEST, folder=folder, name="corpus")
    monkeypatch.setattr(index_cache, "file_sha256", None)
    monkeypatch.setattr(index_cache, "_key", None)
    monkeypatch.setattr(index_cache, "build_sample_index", None)
    index, _ = cached_sample_index(SIZES, *REQUEST, folder=folder, name="corpus", checked_key=key)
    assert_right(index)


@pytest.mark.parametrize(
    "damage",
    [
        _truncated,
        _pickled,
        _of_another_index,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(pickle.dumps(1)),
    ],
    ids=["truncated", "pickled objects", "another index", "empty", "no .npy"],
)
def test_damaged_file_is_built_again(folder: Path, damage: object, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = folder.glob("*_sample_idx.npy")
    damage(path)
    assert_right(read(folder))
    assert "is damaged" in caplog.text
    caplog.clear()
    assert_right(read(folder))
    assert caplog.text == ""


def test_files_that_another_process_is_writing_are_not_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (hashes,) = folder.glob("*_hashes.json")
    written = hashes.read_text()
    hashes.unlink()

    @contextmanager
    def lock_of_a_writer_that_ends(path: Path) -> Iterator[None]:
        hashes.write_text(written)
        yield

    monkeypatch.setattr(index_cache, "file_lock", lock_of_a_writer_that_ends)
    monkeypatch.setattr(index_cache, "build_sample_index", None)
    index = read(folder)
    assert caplog.text == ""
    monkeypatch.undo()
    assert_right(index)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/cache: .*Set index_cache_dir"):
        read(tmp_path / "file" / "cache")
