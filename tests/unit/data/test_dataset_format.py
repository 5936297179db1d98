"""A dataset format is one registered object: a test's own serves writing, training and fingerprints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from megatron.config.sections.data import DataConfig, TokenizerConfig
from megatron.data.data_fingerprint import data_fingerprint
from megatron.data.dataset_format import DATASET_FORMATS, DatasetFormat, Position, dataset_format
from megatron.data.datasets import Datasets, SampleCounts, build_datasets
from megatron.data.formats.mmap import IndexedDataset
from megatron.data.prepare.batches import TokenizeOptions
from megatron.data.prepare.text_files import TextFile
from megatron.data.prepare.tokenize_files import Work, dataset_prefix, tokenize_files
from megatron.data.prepare.tokenizing_pool import TokenizingPool
from megatron.io.working_file import FileFacts, WorkingFile

SEQ_LENGTH = 4
TEXTS = ["one", "two", "three and more", "four"] * 8


class JsonDataset:
    """One JSON list of token ids per line."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.token_file = prefix.with_name(f"{prefix.name}.tokens")
        self.documents = [np.array(json.loads(line)) for line in self.token_file.read_text().splitlines()]
        self.sizes = np.array([len(document) for document in self.documents], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.documents)

    def read(self, index: int, offset: int, length: int) -> npt.NDArray[np.integer]:
        return self.documents[index][offset : offset + length]


class JsonWriter:
    def __init__(self, prefix: Path, vocab_size: int, position: Position) -> None:
        self.file = WorkingFile(prefix.with_name(f"{prefix.name}.tokens"), position.get(".tokens", 0))
        self.publish, self.discard, self.close = self.file.publish, self.file.discard, self.file.close

    def add_documents(self, tokens: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer]) -> None:
        for document in np.split(tokens, np.cumsum(lengths)[:-1]):
            self.file.write(f"{json.dumps(document.tolist())}\n".encode())

    def save(self) -> Position:
        return {".tokens": self.file.save()}

    def finish(self) -> dict[str, FileFacts]:
        return {".tokens": self.file.finish()}


@pytest.fixture
def json_format() -> Iterator[DatasetFormat]:
    yield DATASET_FORMATS.register("json")(DatasetFormat(".tokens", (), JsonDataset, JsonWriter))
    DATASET_FORMATS.unregister("json")


def tokenize(folder: Path, name: str) -> Path:
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    options = TokenizeOptions(TokenizerConfig(type="CharLevelTokenizer"), format=name)
    with TokenizingPool(options, workers=1) as pool:
        tokenize_files([TextFile(text)], folder / name, pool, Work())
    return dataset_prefix(folder / name, "text")


def build(prefix: Path, impl: str) -> Datasets:
    data = DataConfig(data_path=str(prefix), split="8,1,1", impl=impl)
    return build_datasets(data, SampleCounts(40, 4, 4), seq_length=SEQ_LENGTH, seed=3, vocab_size=512)


@pytest.mark.usefixtures("json_format")
@pytest.mark.parametrize("impl", ["json", "infer"])
def test_a_new_format_is_written_and_read_like_mmap(impl: str, tmp_path: Path) -> None:
    ours, reference = build(tokenize(tmp_path, "json"), impl), build(tokenize(tmp_path, "mmap"), "mmap")
    for item in range(40):
        np.testing.assert_array_equal(ours.train[item], reference.train[item])
    assert (ours.valid is None) == (reference.valid is None)


@pytest.mark.usefixtures("json_format")
def test_a_new_format_has_a_fingerprint_of_its_contents(tmp_path: Path) -> None:
    prefix = tokenize(tmp_path, "json")
    data = DataConfig(data_path=str(prefix), impl="infer", tokenizer=TokenizerConfig(type="CharLevelTokenizer"))
    before = data_fingerprint(data, seq_length=SEQ_LENGTH, seed=3)
    assert "data_path (.tokens)" in before and "data_path (.bin)" not in before
    path = prefix.with_name(f"{prefix.name}.tokens")
    path.write_text(path.read_text().replace("[111, 110, 101]", "[111, 110, 102]"))
    assert data_fingerprint(data, seq_length=SEQ_LENGTH, seed=3) != before


@pytest.mark.usefixtures("json_format")
def test_infer_finds_the_format_of_the_files(tmp_path: Path) -> None:
    assert dataset_format("infer", tokenize(tmp_path, "json")).open is JsonDataset
    assert dataset_format("infer", tokenize(tmp_path, "mmap")).open is IndexedDataset
    assert dataset_format("infer", tmp_path / "nowhere").open is IndexedDataset
