"""Damaged and hostile datasets and index caches: refused by a DataError that names them, or read as they were.

Accepted, though samples differ from the original's:

TOKENS  Other token ids below the vocabulary in .bin, or a type of as many bytes that reads them so: datasets of other
        programs carry no checksum. A run that resumes compares the size, sampled pieces of .bin and the whole .idx with
        its first start.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.sections.data import DataConfig
from megatron.data.datasets import SampleCounts, build_datasets
from tests.helpers.configs import SEQ_LENGTH, VOCAB_SIZE, write_dataset
from tests.helpers.mutations import Findings, damaged_bytes, settings_of

TOKENS = "other tokens"
SAMPLES = 300


def samples(folder: Path) -> npt.NDArray[np.int64]:
    """Every sample of the dataset in `folder`, in the order of training."""
    data = DataConfig(data_path=str(folder / "text_document"), index_cache_dir=str(folder / "cache"), split="1, 0, 0")
    train = build_datasets(
        data, SampleCounts(SAMPLES, 0, 0), seq_length=SEQ_LENGTH, seed=7, vocab_size=VOCAB_SIZE
    ).train
    return np.stack([train[item] for item in range(len(train))])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with its index cache."""
    folder = tmp_path_factory.mktemp("original")
    write_dataset(folder / "text_document")
    samples(folder)
    return folder


@st.composite
def changes(draw: st.DrawFn, original: Path) -> tuple[str, bytes]:
    """A file of the dataset or of its cache, and its new content."""
    files = [path for path in original.rglob("*") if path.suffix in (".bin", ".idx", ".npy")]
    file = draw(st.sampled_from(sorted(files)))
    content = file.read_bytes()
    damage = damaged_bytes(content)
    if file.suffix == ".npy":
        header = content[: 10 + int.from_bytes(content[8:10], "little")]
        damage |= damaged_bytes(header).map(lambda changed: changed + content[len(header) :])
    return str(file.relative_to(original)), draw(damage)


@pytest.mark.parametrize("examples", [60, pytest.param(1000, marks=pytest.mark.full)])
def test_damaged_datasets(examples: int, original: Path, tmp_path: Path) -> None:
    expected, found = samples(original), Findings()

    @settings_of(examples)
    @given(changes(original))
    def read(change: tuple[str, bytes]) -> None:
        name, content = change
        folder = tmp_path / "data"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        (folder / name).write_bytes(content)
        got = found.read(lambda: samples(folder), folder)
        if got is None:
            return
        assert got.shape == expected.shape and got.min() >= 0 and got.max() < VOCAB_SIZE
        if np.array_equal(got, expected):
            found.accept("read as it was")
        else:
            assert name.endswith(".bin")
            found.accept(TOKENS)

    read()
    found.report()
