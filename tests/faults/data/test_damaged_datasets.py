"""A damaged dataset ends a run with a clear error, and nothing half-written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.helpers.configs import TOKENFORMER
from tests.helpers.runs import fails_with


def test_a_truncated_index(write_config: Callable[..., Path], dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "text_document"
    copy.parent.mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(dataset.with_suffix(suffix), copy.with_suffix(suffix))
    file = copy.with_suffix(".idx")
    file.write_bytes(file.read_bytes()[:-7])
    assert str(file) in fails_with(write_config(TOKENFORMER, data_path=str(copy)))
    assert not list((tmp_path / "tiny").glob("*global_step*"))
