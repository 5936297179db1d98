"""A damaged dataset ends a run with a clear error, and nothing half-written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.configs import TOKENFORMER
from tests.helpers.runs import fails_with


@pytest.mark.parametrize("damage", ["missing .bin", "missing .idx", "truncated .bin", "truncated .idx", "foreign .idx"])
def test_damaged_datasets(damage: str, write_config: Callable[..., Path], dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "text_document"
    copy.parent.mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(dataset.with_suffix(suffix), copy.with_suffix(suffix))
    kind, suffix = damage.split()
    file = copy.with_suffix(suffix)
    if kind == "missing":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    else:
        file.write_bytes(b"something else entirely, long enough to be a header")
    assert str(file) in fails_with(write_config(TOKENFORMER, data_path=str(copy)))
