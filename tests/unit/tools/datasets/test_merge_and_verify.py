"""Merged parts are the dataset of all inputs; a verification names what is wrong, and a start what it sees."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron.config.sections.data import DataConfig, TokenizerConfig
from megatron.data.data_fingerprint import data_fingerprint
from megatron.data.dataset_manifest import require_manifests, tokenizer_facts
from megatron.data.formats.mmap import IndexedDatasetWriter
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import DataError
from tests.helpers.tokenizer_files import write_tokenizers
from tools.datasets import dataset_token_count, merge_datasets, preprocess_data, verify_dataset

CHARACTERS = ["--tokenizer-type", "CharLevelTokenizer", "--append-eod"]
TEXTS = [f"text {number} " * (number % 4 + 1) for number in range(60)]


def write_inputs(folder: Path) -> str:
    for number in range(5):
        lines = [json.dumps({"text": text}) for text in TEXTS[number * 12 : number * 12 + 12]]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return str(folder / "?.jsonl")


def preprocess(inputs: str, output: Path, *words: str) -> Path:
    assert preprocess_data.main(["--input", inputs, "--output-prefix", str(output), *CHARACTERS, *words]) == 0
    return output.with_name(f"{output.name}_text_document")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return preprocess(write_inputs(tmp_path), tmp_path / "whole")


def contents(prefix: Path) -> list[bytes]:
    return [prefix.with_name(f"{prefix.name}.{kind}").read_bytes() for kind in ("bin", "idx")]


def merge(output: Path, *inputs: Path, words: tuple[str, ...] = ()) -> Path:
    given = [str(path) for path in inputs]
    assert merge_datasets.main(["--input", *given, "--output-prefix", str(output), *words]) == 0
    return output


def test_parts_in_any_order_by_any_workers_are_the_whole(dataset: Path, tmp_path: Path) -> None:
    order = [1, 2, 3]
    random.Random(1).shuffle(order)
    for number, workers in zip(order, ("1", "2", "1"), strict=True):
        preprocess(str(tmp_path / "?.jsonl"), tmp_path / "parts", "--shard", f"{number}/3", "--workers", workers)
    merged = merge(tmp_path / "merged", tmp_path / "parts_shards")
    assert contents(merged) == contents(dataset)
    assert verify_dataset.main([str(merged), str(dataset)]) == 0
    parts = sorted(path.with_suffix("") for path in (tmp_path / "parts_shards").glob("*.bin"))
    assert contents(merge(tmp_path / "listed", *parts)) == contents(dataset)
    with pytest.raises(DataError, match="listed: a dataset is there already"):
        merge(tmp_path / "listed", *parts)
    merge(tmp_path / "listed", *parts[:2], words=("--overwrite",))
    assert contents(tmp_path / "listed") != contents(dataset)


def test_a_merge_misses_nothing(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    preprocess(inputs, tmp_path / "parts", "--shard", "1/2")
    folder = tmp_path / "parts_shards"
    with pytest.raises(DataError, match="of 5 inputs, 2 are missing: 2, 4"):
        merge(tmp_path / "merged", folder)
    preprocess(inputs, tmp_path / "parts", "--shard", "2/2")
    (folder / "2_1.progress.json").touch()
    with pytest.raises(DataError, match="2_1 is not finished"):
        merge(tmp_path / "merged", folder)
    (folder / "2_1.progress.json").unlink()
    tokens = folder / "4_3_text_document.bin"
    tokens.write_bytes(tokens.read_bytes()[::-1])
    with pytest.raises(DataError, match=r"4_3_text_document\.bin: not what its manifest says"):
        merge(tmp_path / "merged", folder)
    write_tokenizers(tmp_path)
    other = ["--tokenizer-type", "HFTokenizer", "--vocab-file", str(tmp_path / "tokenizer.json"), "--overwrite"]
    preprocess(inputs, tmp_path / "parts", "--shard", "2/2", *other)
    with pytest.raises(DataError, match="made by different tokenizers or options"):
        merge(tmp_path / "merged", folder)
    assert not list(tmp_path.glob("merged*"))


def damage_token(prefix: Path) -> None:
    tokens = np.memmap(f"{prefix}.bin", np.uint16, mode="r+")
    tokens[len(TEXTS[0]) + 1 + 3] = 600
    tokens.flush()


def damage_end(prefix: Path) -> None:
    tokens = np.memmap(f"{prefix}.bin", np.uint16, mode="r+")
    tokens[len(TEXTS[0])] = 65
    tokens.flush()


def damage_count(prefix: Path) -> None:
    path = prefix.with_name(f"{prefix.name}.manifest.json")
    path.write_text(path.read_text().replace('"documents": 60', '"documents": 61', 1))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "token": (damage_token, ".bin: document 1 holds the token id 600 at token 3; the vocabulary ends at 511"),
    "end": (damage_end, ".bin: document 0 does not end with the end-of-document token 0"),
    "hash": (damage_end, ".manifest.json says"),
    "count": (damage_count, "60 documents and"),
    "index": (lambda prefix: Path(f"{prefix}.idx").write_bytes(b"x"), ".idx: not an mmap index"),
    "missing": (lambda prefix: Path(f"{prefix}.bin").unlink(), ".bin: no such file"),
    "manifest": (lambda prefix: Path(f"{prefix}.manifest.json").write_text("{"), ".manifest.json: not JSON"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_verification_names_the_damage(name: str, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_dataset.main([str(dataset)]) == 0
    capsys.readouterr()
    damage, message = DAMAGES[name]
    damage(dataset)
    assert verify_dataset.main([str(dataset)]) == 1
    said = capsys.readouterr().out
    assert f"{dataset}: damaged" in said and message in said


def test_datasets_of_other_programs_are_verified_by_what_the_user_gives(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "foreign", np.uint16) as writer:
        writer.add_document([5, 6, 0])
        writer.add_document([9, 0])
    foreign = str(tmp_path / "foreign")
    assert verify_dataset.main([foreign]) == 0
    assert verify_dataset.main([foreign, "--vocab-size", "10", "--eod", "0"]) == 0
    assert verify_dataset.main([foreign, "--vocab-size", "9"]) == 1
    assert verify_dataset.main([foreign, "--eod", "6"]) == 1
    assert verify_dataset.main([foreign, "--sha256", "00"]) == 1


def test_tokens_are_counted(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dataset_token_count.main([str(dataset), str(dataset)]) == 0
    tokens = sum(len(text) + 1 for text in TEXTS)
    lines = capsys.readouterr().out.splitlines()
    assert f"60 documents, {tokens:,} tokens (uint16)" in lines[0]
    assert lines[2] == f"together: 120 documents, {2 * tokens:,} tokens"


def test_a_start_compares_tokenizer_and_files(dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tokenizers(tmp_path)
    characters = TokenizerConfig(type="CharLevelTokenizer")
    bpe = TokenizerConfig(type="HFTokenizer", vocab_file=str(tmp_path / "tokenizer.json"))

    def begin(tokenizer: TokenizerConfig) -> None:
        data = DataConfig(data_path=str(dataset), tokenizer=tokenizer)
        fingerprint = data_fingerprint(data, seq_length=8, seed=1)
        require_manifests(data, tokenizer_facts(tokenizer, build_tokenizer(tokenizer)), fingerprint)

    begin(characters)
    with pytest.raises(DataError, match=r"data_path: .* tokenized by another tokenizer(.|\n)*CharLevel(.|\n)*HFTok"):
        begin(bpe)
    before = Path(f"{dataset}.bin").read_bytes()
    damage_end(dataset)
    with pytest.raises(DataError, match=r"data_path: .*\.bin is not what .*\.manifest\.json says"):
        begin(characters)
    Path(f"{dataset}.bin").write_bytes(before)
    Path(f"{dataset}.manifest.json").unlink()
    with caplog.at_level("INFO"):
        begin(bpe)
    assert "no manifest beside" in caplog.text
