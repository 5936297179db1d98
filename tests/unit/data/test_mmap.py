"""The files are NeoX's, byte for byte, and damaged ones are named."""

import hashlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron.data.formats.mmap import IndexedDataset, IndexedDatasetWriter, data_file, index_file, token_dtype
from megatron.errors import DataError

DOCUMENTS = [[5, 1, 2], [], [65534], [7] * 40, [0]]
# The index that the published implementation writes for 64 WikiText-2 documents of the sizes in wikitext2_order.npz.
WIKITEXT2_INDEX_SHA256 = "57f591d074d2495fe2f2cd3fdbfe41f260be017193bdc6df14db0786213c4a0d"


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.v1_text_document"
    with IndexedDatasetWriter(path, np.uint16) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    return path


@pytest.mark.parametrize(("dtype", "code", "letter"), [(np.uint16, 8, "H"), (np.int32, 4, "i")])
def test_bytes_follow_the_format(tmp_path: Path, dtype: type[np.integer], code: int, letter: str) -> None:
    prefix = tmp_path / "made" / "corpus"
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    sizes = [len(document) for document in DOCUMENTS]
    tokens = [token for document in DOCUMENTS for token in document]
    pointers = [sum(sizes[:i]) * struct.calcsize(letter) for i in range(len(sizes))]
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1)
    arrays = struct.pack("<5i", *sizes) + struct.pack("<5q", *pointers) + struct.pack("<6q", *range(6))
    assert index_file(prefix).read_bytes() == header + arrays
    assert data_file(prefix).read_bytes() == struct.pack(f"<{len(tokens)}{letter}", *tokens)
    assert writer.num_documents == len(DOCUMENTS)
    assert writer.num_tokens == len(tokens)


def test_index_of_wikitext_is_the_published_one(tmp_path: Path) -> None:
    sizes = np.load(Path(__file__).with_name("wikitext2_order.npz"))["sizes"]
    with IndexedDatasetWriter(tmp_path / "wikitext2", np.uint16) as writer:
        for size in sizes:
            writer.add_document(np.zeros(size, dtype=np.uint16))
    digest = hashlib.sha256(index_file(tmp_path / "wikitext2").read_bytes()).hexdigest()
    assert digest == WIKITEXT2_INDEX_SHA256


def test_reads_what_was_written(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.dtype == np.uint16
    assert dataset.sizes.tolist() == [3, 0, 1, 40, 1]
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert dataset.read(0, 1, 2).tolist() == [1, 2]
    assert dataset.read(3, 40, 0).tolist() == []
    with pytest.raises(IndexError):
        dataset.read(0, 1, 3)
    with pytest.raises(ValueError, match="read-only"):
        dataset[0][0] = 1


def test_a_dataset_without_tokens_can_be_read(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "empty", np.uint16) as writer:
        writer.add_document([])
    assert IndexedDataset(tmp_path / "empty")[0].tolist() == []


def test_many_documents_cross_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.formats.mmap.ENTRIES_AT_A_TIME", 3)
    documents = [list(range(n % 5)) for n in range(10)]
    with IndexedDatasetWriter(tmp_path / "many", np.int32) as writer:
        for document in documents:
            writer.add_document(document)
    dataset = IndexedDataset(tmp_path / "many")
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert dataset.document_indices.tolist() == list(range(11))


def test_pickles_as_a_path(prefix: Path) -> None:
    pickled = pickle.dumps(IndexedDataset(prefix))
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[3].tolist() == DOCUMENTS[3]  # noqa: S301 - made above


def test_token_type_is_neox_s() -> None:
    assert [token_dtype(size) for size in (512, 65499, 65500, 128256)] == [np.uint16, np.uint16, np.int32, np.int32]


def _overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def _truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda p: index_file(p).unlink(), r"corpus\.v1_text_document\.idx: no such file.*preprocess_data"),
    "no data": (lambda p: data_file(p).unlink(), r"corpus\.v1_text_document\.bin: no such file"),
    "other format": (lambda p: _overwrite(index_file(p), 0, b"TNTIDX\0\0"), r"\.idx: not an mmap index"),
    "empty index": (lambda p: _truncate(index_file(p), 0), r"\.idx: not an mmap index"),
    "cut header": (lambda p: _truncate(index_file(p), 20), r"\.idx: truncated within its header"),
    "other version": (lambda p: _overwrite(index_file(p), 9, b"\2"), r"\.idx: mmap index of version 2"),
    "float tokens": (lambda p: _overwrite(index_file(p), 17, b"\6"), r"\.idx: dtype code 6 .* rewards"),
    "cut index": (lambda p: _truncate(index_file(p), 100), r"\.idx: holds 100 bytes where .* 142 \(5 sequences\)"),
    "wrong pointer": (lambda p: _overwrite(index_file(p), 54 + 8, b"\x09"), r"\.idx: .*contradict.*sequence 0"),
    "negative size": (lambda p: _overwrite(index_file(p), 34, b"\xff\xff\xff\xff"), r"\.idx: .*contradict"),
    "cut data": (lambda p: _truncate(data_file(p), 88), r"\.bin: holds 88 bytes where .*\.idx promises 90"),
    "other data": (lambda p: data_file(p).write_bytes(b"x" * 100), r"\.bin: holds 100 bytes where"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_named(prefix: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(prefix)
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix)


def test_failure_leaves_an_older_pair_alone(prefix: Path) -> None:
    before = {path.name: path.read_bytes() for path in prefix.parent.iterdir()}
    with pytest.raises(ZeroDivisionError), IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document([1, 2, 3])
        _ = 1 // 0
    assert {path.name: path.read_bytes() for path in prefix.parent.iterdir()} == before


def test_failure_leaves_nothing_new(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"token ids 1 to 70000 of document 1 do not fit uint16"),
        IndexedDatasetWriter(tmp_path / "corpus", np.uint16) as writer,
    ):
        writer.add_document([1])
        writer.add_document([1, 70000])
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(DataError, match=r"file/corpus\.bin: cannot be written"),
        IndexedDatasetWriter(tmp_path / "file" / "corpus", np.uint16),
    ):
        pass
