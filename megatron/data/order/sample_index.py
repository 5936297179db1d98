"""The order in which fixed-length samples are cut from documents: NeoX's three arrays, index for index.

All epochs of the documents are concatenated and shuffled once; sample i is tokens i*s to i*s+s of that stream (one
more than s, so that neighbours share a token); the samples are shuffled once more with the same generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron.errors import DataError

_INT32_MAX = np.iinfo(np.int32).max
_UINT32_MAX = np.iinfo(np.uint32).max
CHUNK = 1 << 14
"""Documents or samples that are handled at once: what is held beside the result stays in a core's cache."""


@dataclass(frozen=True)
class SampleIndex:
    """The position of each sample in the documents.

    doc_idx      [epochs * documents]  document ids in the order of the shuffled stream
    sample_idx   [n + 1, 2]            for sample i in stream order: position in doc_idx, token offset in that document;
                                       row i + 1 is the sample's last token
    shuffle_idx  [n]                   stream-order sample that is served as the i-th
    """

    doc_idx: npt.NDArray[np.integer]
    sample_idx: npt.NDArray[np.integer]
    shuffle_idx: npt.NDArray[np.integer]


def num_tokens_in(sizes: npt.NDArray[np.integer], documents: range) -> int:
    """Counts the tokens of a contiguous range of documents."""
    return int(sizes[documents.start : documents.stop].sum(dtype=np.int64))


def num_epochs_for(num_tokens: int, num_samples: int, seq_length: int) -> int:
    """Returns the fewest passes over `num_tokens` tokens that hold `num_samples` samples; at least 1."""
    needed = num_samples * seq_length + 1
    return max(1, -(-needed // num_tokens))


def build_sample_index(
    sizes: npt.NDArray[np.integer],
    documents: range,
    num_samples: int,
    seq_length: int,
    seed: int,
    *,
    chunk: int = CHUNK,
    on_array: Callable[[str, npt.NDArray[np.integer]], object] = lambda name, array: None,
) -> SampleIndex:
    """Builds the index of at least `num_samples` samples of `seq_length` + 1 tokens from a range of documents.

    `sizes` are the token counts of all documents of the dataset. Takes little more memory than the result. `on_array`
    is called with the name of each array and the array as soon as that is complete. Raises DataError when the documents
    hold no token, or less than one sample in the epochs that `num_samples` needs.
    """
    extent = index_extent(sizes, documents, num_samples, seq_length)
    generator = np.random.RandomState(seed)
    doc_idx = _repeated(documents, extent.num_epochs, extent.types.doc)
    generator.shuffle(doc_idx)
    on_array("doc_idx", doc_idx)
    shuffle_idx = np.arange(extent.num_samples, dtype=extent.types.shuffle)
    generator.shuffle(shuffle_idx)
    on_array("shuffle_idx", shuffle_idx)
    sample_idx = np.empty((extent.num_samples + 1, 2), dtype=extent.types.sample)
    _cut_samples(sizes, doc_idx, sample_idx, seq_length, chunk)
    on_array("sample_idx", sample_idx)
    return SampleIndex(doc_idx, sample_idx, shuffle_idx)


def index_extent(sizes: npt.NDArray[np.integer], documents: range, num_samples: int, seq_length: int) -> IndexExtent:
    """Returns the sizes of the index that `build_sample_index` builds, and raises what it raises."""
    tokens_per_epoch = num_tokens_in(sizes, documents)
    if tokens_per_epoch == 0:
        raise DataError(f"documents {documents.start:,} to {documents.stop:,} hold no token.")
    num_epochs = num_epochs_for(tokens_per_epoch, num_samples, seq_length)
    num_built = (num_epochs * tokens_per_epoch - 1) // seq_length
    if num_built == 0:
        raise DataError(
            f"documents {documents.start:,} to {documents.stop:,} hold {tokens_per_epoch:,} tokens; one sample needs "
            f"{seq_length + 1:,}."
        )
    num_entries = num_epochs * len(documents)
    return IndexExtent(num_epochs, num_entries, num_built, index_types(documents.stop, num_entries, num_built))


def _repeated(documents: range, num_epochs: int, dtype: type[np.integer]) -> npt.NDArray[np.integer]:
    ids = np.arange(documents.start, documents.stop, dtype=dtype)
    return ids if num_epochs == 1 else np.tile(ids, num_epochs)


@dataclass(frozen=True)
class IndexExtent:
    """Sizes of an index before it is built: they follow from the request alone."""

    num_epochs: int
    num_entries: int
    """Entries of doc_idx."""

    num_samples: int
    types: IndexTypes


class IndexTypes(NamedTuple):
    """Integer types of the arrays of an index, as NeoX chooses them."""

    doc: type[np.integer]
    sample: type[np.integer]
    shuffle: type[np.integer]


def index_types(num_documents: int, num_entries: int, num_samples: int) -> IndexTypes:
    """Returns the types that count `num_documents` documents, `num_entries` entries of doc_idx and the samples."""
    # NeoX picks the second by the number of samples alone and would overflow on more entries than an int32 counts.
    small = 2 * (num_samples + 1) < _INT32_MAX and num_entries <= _INT32_MAX
    return IndexTypes(
        doc=np.int32 if num_documents <= _INT32_MAX else np.int64,
        sample=np.int32 if small else np.int64,
        shuffle=np.uint32 if num_samples < _UINT32_MAX - 1 else np.int64,
    )


def _cut_samples(
    sizes: npt.NDArray[np.integer],
    doc_idx: npt.NDArray[np.integer],
    sample_idx: npt.NDArray[np.integer],
    seq_length: int,
    chunk: int,
) -> None:
    """Fills `sample_idx` [num_samples + 1, 2] with every seq_length-th token of the stream.

    An entry is the first document that ends beyond the token, and the token's offset in that.
    """
    num_entries = len(sample_idx)
    filled, stream_start = 0, 0
    for first in range(0, len(doc_idx), chunk):
        lengths = sizes.take(doc_idx[first : first + chunk], mode="clip").astype(np.int64)
        ends = stream_start + np.cumsum(lengths)
        # Entries whose token comes before the end of each document: no search, for the tokens are evenly spaced.
        bounds = np.minimum(-(-ends // seq_length), num_entries)
        done = 0
        while filled < bounds[-1]:
            # Entries are bounded as documents are, unless one document alone has more of them.
            stop = max(int(np.searchsorted(bounds, filled + chunk, side="right")), done + 1)
            counts = np.diff(bounds[done:stop], prepend=filled)
            last = int(bounds[stop - 1])
            tokens = np.arange(filled, last, dtype=np.int64) * seq_length
            sample_idx[filled:last, 0] = np.repeat(np.arange(first + done, first + stop), counts)
            sample_idx[filled:last, 1] = tokens - np.repeat(ends[done:stop] - lengths[done:stop], counts)
            filled, done = last, stop
        stream_start = int(ends[-1])
    # NeoX starts at the first document even when that one is empty.
    sample_idx[0] = 0
