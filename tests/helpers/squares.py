"""A dataset whose items are known, and that can fail."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from megatron.errors import DataError


class Squares(Dataset[npt.NDArray[np.int64]]):
    """Item i is [i, i * i]; item `bad` raises a DataError, and `broken` what nobody expects."""

    def __init__(self, length: int, bad: int | None = None, broken: int | None = None) -> None:
        self.length = length
        self.bad = bad
        self.broken = broken

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> npt.NDArray[np.int64]:
        if item == self.bad:
            raise DataError(f"corpus.bin: document {item} is bad")
        if item == self.broken:
            raise ZeroDivisionError
        return np.array([item, item * item])
