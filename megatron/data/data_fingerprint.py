"""The fingerprint of the training data: the facts that decide the tokens of every step, for two runs to compare."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron.config.sections.data import DataConfig, TokenizerConfig
from megatron.data.dataset_format import dataset_file, dataset_format
from megatron.data.datasets import split_shares
from megatron.errors import DataError
from megatron.io.hashing import file_sha256, sampled_sha256


def data_fingerprint(data: DataConfig, *, seq_length: int, seed: int) -> dict[str, str]:
    """Returns facts by the configuration key that they belong to. Contents count, paths do not.

    The index of a dataset is hashed whole; of its tokens, the size and a sample count, which cost little however large
    the file is. Raises DataError when a file cannot be read.
    """
    facts = {"seq_length": str(seq_length), "seed": str(seed)} | tokenizer_fingerprint(data.tokenizer)
    if data.preshuffled:
        facts["preshuffled"] = "true"
    if data.data_path is not None:
        facts["split"] = _numbers(split_shares(data.split))
        facts |= _dataset_facts("data_path", data.impl, Path(data.data_path))
    for part in ("train", "valid", "test"):
        paths: list[str] = getattr(data, f"{part}_data_paths") or []
        weights: list[float] | None = getattr(data, f"{part}_data_weights")
        if paths:
            facts[f"{part}_data_weights"] = (
                f"by number of documents, alpha {data.weighted_sampler_alpha:.12g}"
                if data.weight_by_num_documents
                else _numbers(weights or [1.0] * len(paths))
            )
        for number, path in enumerate(paths):
            facts |= _dataset_facts(f"{part}_data_paths[{number}]", data.impl, Path(path))
        for number, path in enumerate(getattr(data, f"{part}_label_data_paths") or []):
            facts |= _dataset_facts(f"{part}_label_data_paths[{number}]", data.impl, Path(path))
    return facts


def tokenizer_fingerprint(tokenizer: TokenizerConfig) -> dict[str, str]:
    """Returns the facts that decide a tokenizer's ids. Raises DataError when a file cannot be read."""
    facts: dict[str, str] = {"tokenizer_type": tokenizer.type}
    for key, name in (("vocab_file", tokenizer.vocab_file), ("merge_file", tokenizer.merge_file)):
        if name is not None:
            facts[key] = f"sha256 {_sha256(Path(name))}"
    return facts


def fingerprint_differences(ours: dict[str, str], theirs: dict[str, str], name: str) -> Iterator[str]:
    """Yields each fact that differs between this run and the one that `name` describes, with both values."""
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            yield f"{key}: {name} {theirs.get(key, 'none')}, this run {ours.get(key, 'none')}"


def _dataset_facts(key: str, impl: str, prefix: Path) -> dict[str, str]:
    files = dataset_format(impl, prefix)
    tokens = files.token_file(prefix)
    try:
        size, sampled = tokens.stat().st_size, sampled_sha256(tokens)
    except OSError as error:
        raise DataError(f"{tokens}: cannot be read ({error.strerror}). It belongs to {key}.") from error
    whole = {f"{key} ({suffix})": f"sha256 {_sha256(dataset_file(prefix, suffix))}" for suffix in files.index_suffixes}
    return whole | {f"{key} ({files.token_suffix})": f"{size} bytes, sha256 of pieces {sampled}"}


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def _numbers(values: list[float]) -> str:
    total = sum(values)
    return ", ".join(f"{value / total:.12g}" for value in values)
