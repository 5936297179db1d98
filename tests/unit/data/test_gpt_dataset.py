"""Samples are the right tokens of the shuffled stream."""

from pathlib import Path

import numpy as np
import pytest

from megatron.data.formats.mmap import IndexedDataset, IndexedDatasetWriter
from megatron.data.order.gpt_dataset import GPTDataset
from megatron.data.order.sample_index import build_sample_index
from megatron.errors import DataError

SEQ_LENGTH = 6


def make(folder: Path, sizes: list[int], num_samples: int, vocab_size: int = 60000) -> GPTDataset:
    """Documents whose tokens count up over the whole dataset."""
    tokens = iter(range(60000))
    with IndexedDatasetWriter(folder / "corpus", np.uint16) as writer:
        for size in sizes:
            writer.add_document([next(tokens) for _ in range(size)])
    documents = IndexedDataset(folder / "corpus")
    return GPTDataset(
        documents,
        build_sample_index(documents.sizes, range(len(sizes)), num_samples, SEQ_LENGTH, 5),
        vocab_size,
        SEQ_LENGTH,
    )


@pytest.mark.parametrize("sizes", [[40, 3, 0, 11, 1, 0, 25], [1] * 50, [500], [0, 0, 20]], ids=str)
@pytest.mark.parametrize("num_samples", [2, 40])
def test_items_are_windows_of_the_stream(tmp_path: Path, sizes: list[int], num_samples: int) -> None:
    dataset = make(tmp_path, sizes, num_samples)
    index = dataset.index
    stream = np.concatenate([dataset.documents[document] for document in index.doc_idx])
    for item, sample in enumerate(index.shuffle_idx.tolist()):
        got = dataset[item]
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, stream[sample * SEQ_LENGTH : sample * SEQ_LENGTH + SEQ_LENGTH + 1])


def test_length_is_neox_s(tmp_path: Path) -> None:
    """One item less than there are samples; the last is served all the same, and beyond it items start over."""
    dataset = make(tmp_path, [70], 3)
    samples = len(dataset.index.shuffle_idx)
    assert len(dataset) == samples - 1 == 10
    distinct = {dataset[item].tobytes() for item in range(samples)}
    assert len(distinct) == samples
    for item in (samples, samples + 1, 5 * len(dataset) + 3):
        np.testing.assert_array_equal(dataset[item], dataset[item % len(dataset)])


def test_a_single_sample_is_repeated(tmp_path: Path) -> None:
    dataset = make(tmp_path, [SEQ_LENGTH + 1], 1)
    assert len(dataset) == 1
    np.testing.assert_array_equal(dataset[3], dataset[0])


def test_token_beyond_the_vocabulary_names_file_and_document(tmp_path: Path) -> None:
    dataset = make(tmp_path, [50, 30], 10, vocab_size=50)
    with pytest.raises(DataError, match=r"corpus\.bin: document 1 holds the token id [5-7]\d, .* ends at 49"):
        for item in range(len(dataset.index.shuffle_idx)):
            _ = dataset[item]


def test_vocabulary_that_just_holds_the_tokens(tmp_path: Path) -> None:
    dataset = make(tmp_path, [50, 30], 10, vocab_size=80)
    assert max(dataset[item].max() for item in range(len(dataset.index.shuffle_idx))) <= 79


def test_negative_token_is_an_error_too(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "corpus", np.int32) as writer:
        writer.add_document([1, 2, -3, 4, 5, 6, 7, 8, 9])
    documents = IndexedDataset(tmp_path / "corpus")
    index = build_sample_index(documents.sizes, range(1), 1, SEQ_LENGTH, 5)
    with pytest.raises(DataError, match=r"document 0 holds the token id -3"):
        _ = GPTDataset(documents, index, 100, SEQ_LENGTH)[0]
