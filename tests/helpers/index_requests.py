"""One request for a sample index, and what must come of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.data.order.index_cache import cached_sample_index
from megatron.data.order.sample_index import SampleIndex, build_sample_index

SIZES = np.arange(1, 60, dtype=np.int32)
REQUEST = (range(5, 50), 400, 8, 11)


def read(
    folder: Path, sizes: npt.NDArray[np.integer] = SIZES, request: tuple[range, int, int, int] = REQUEST
) -> SampleIndex:
    return cached_sample_index(sizes, *request, folder=folder, name="corpus")[0]


def assert_right(index: SampleIndex) -> None:
    for name, array in vars(build_sample_index(SIZES, *REQUEST)).items():
        assert getattr(index, name).dtype == array.dtype
        np.testing.assert_array_equal(getattr(index, name), array)
