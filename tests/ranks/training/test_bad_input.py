"""What goes wrong while training: a clear error, a non-zero exit code, nothing half-written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron.data.formats.mmap import IndexedDatasetWriter
from tests.helpers.configs import TOKENFORMER
from tests.helpers.runs import fails_with


def test_token_ids_beyond_the_vocabulary(write_config: Callable[..., Path], tmp_path: Path) -> None:
    prefix = tmp_path / "big" / "text_document"
    prefix.parent.mkdir()
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(100):
            writer.add_document(np.full(40, 600))
    error = fails_with(write_config(TOKENFORMER, data_path=str(prefix)))
    assert str(prefix) in error and "600" in error and "ends at 511" in error
    assert not list((tmp_path / "tiny").glob("*global_step*"))
