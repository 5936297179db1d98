"""The order of samples is NeoX's, index for index."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.order.sample_index import SampleIndex, build_sample_index, index_types, num_epochs_for
from megatron.errors import DataError


def build_naively(sizes: list[int], documents: range, num_samples: int, seq_length: int, seed: int) -> SampleIndex:
    """The rules, token by token."""
    tokens = sum(sizes[document] for document in documents)
    epochs = 1
    while (epochs * tokens - 1) // seq_length < num_samples:
        epochs += 1
    generator = np.random.RandomState(seed)
    doc_idx = np.array(list(documents) * epochs, dtype=np.int32)
    generator.shuffle(doc_idx)
    stream = [(position, offset) for position, document in enumerate(doc_idx) for offset in range(sizes[document])]
    count = (len(stream) - 1) // seq_length
    # The walk starts at the first document, and later rows are the last token of the sample before.
    rows = [(0, 0)] + [stream[i * seq_length] for i in range(1, count + 1)]
    shuffle_idx = np.arange(count, dtype=np.uint32)
    generator.shuffle(shuffle_idx)
    return SampleIndex(doc_idx, np.array(rows, dtype=np.int32).reshape(-1, 2), shuffle_idx)


def assert_same(got: SampleIndex, want: SampleIndex) -> None:
    for name, array in vars(want).items():
        other = getattr(got, name)
        assert other.dtype == array.dtype, name
        np.testing.assert_array_equal(other, array, err_msg=name)


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=30).filter(any),
    seq_length=st.integers(1, 20),
    num_samples=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
    chunk=st.integers(1, 40),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_equals_the_naive_walk(
    sizes: list[int], seq_length: int, num_samples: int, seed: int, chunk: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(sizes) - 1))
    documents = range(start, data.draw(st.integers(start + 1, len(sizes))))
    if sum(sizes[document] for document in documents) == 0:
        documents = range(len(sizes))
    got = build_sample_index(np.array(sizes, dtype=np.int32), documents, num_samples, seq_length, seed, chunk=chunk)
    assert_same(got, build_naively(sizes, documents, num_samples, seq_length, seed))


def test_equals_the_published_implementation() -> None:
    """64 WikiText-2 documents, sequence length 128, 1000 samples, seed 1234: one epoch gives 2017 samples."""
    published = np.load(Path(__file__).with_name("wikitext2_order.npz"))
    got = build_sample_index(published["sizes"], range(64), 1000, 128, 1234)
    assert_same(got, SampleIndex(published["doc_idx"], published["sample_idx"], published["shuffle_idx"]))


def test_many_epochs_of_real_sizes() -> None:
    sizes = np.load(Path(__file__).with_name("wikitext2_order.npz"))["sizes"][:12]
    got = build_sample_index(sizes, range(12), 2000, 100, 7)
    assert len(got.doc_idx) == 12 * num_epochs_for(int(sizes.sum()), 2000, 100) > 12
    assert_same(got, build_naively(sizes.tolist(), range(12), 2000, 100, 7))


def test_unaligned_sizes() -> None:
    """Sizes come from a memory map at an odd offset."""
    raw = np.frombuffer(b"x" + np.array([9, 4, 7], dtype=np.int32).tobytes(), dtype=np.uint8)
    assert_same(
        build_sample_index(raw[1:].view(np.int32), range(3), 5, 3, 0), build_naively([9, 4, 7], range(3), 5, 3, 0)
    )


@pytest.mark.parametrize(
    ("counts", "types"),
    [
        ((2**31 - 1, 2**31 - 1, 2**30 - 3), (np.int32, np.int32, np.uint32)),
        ((2**31, 2**31 - 1, 2**30 - 3), (np.int64, np.int32, np.uint32)),
        ((2**31 - 1, 2**31, 2**30 - 3), (np.int32, np.int64, np.uint32)),
        ((2**31 - 1, 2**31 - 1, 2**30 - 1), (np.int32, np.int64, np.uint32)),
        ((2**31 - 1, 2**31 - 1, 2**32 - 3), (np.int32, np.int64, np.uint32)),
        ((2**31 - 1, 2**31 - 1, 2**32 - 2), (np.int32, np.int64, np.int64)),
    ],
)
def test_types_widen_when_counts_exceed_them(counts: tuple[int, int, int], types: tuple[type, type, type]) -> None:
    """Counts of documents, of entries of doc_idx, and of samples."""
    assert index_types(*counts) == types
    assert all(np.iinfo(kind).max >= count for kind, count in zip(types, counts, strict=True))


@pytest.mark.parametrize(
    ("sizes", "num_samples", "message"),
    [([0, 0], 1, "hold no token"), ([3, 0], 0, "hold 3 tokens; one sample needs 5")],
)
def test_too_little_text(sizes: list[int], num_samples: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_sample_index(np.array(sizes, dtype=np.int32), range(2), num_samples, 4, 0)
