"""A short name for a batch of samples, by which two runs can see that they trained on the same tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


def sample_digests(samples: npt.NDArray[np.integer]) -> list[bytes]:
    """SHA-256 of each sample of [samples, seq_length + 1] token ids, taken as little-endian int64."""
    return [hashlib.sha256(row.tobytes()).digest() for row in np.ascontiguousarray(samples, dtype="<i8")]


def batch_hash(digests: Iterable[bytes]) -> str:
    """SHA-256 of the samples' digests one after the other, in the order of the global batch; hexadecimal."""
    return hashlib.sha256(b"".join(digests)).hexdigest()
