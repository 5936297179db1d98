"""Builds the training, validation and test datasets of a configuration, with NeoX's splits and sample counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron.config.sections.data import DataConfig
from megatron.config.sections.training import TrainingConfig
from megatron.data.dataset_format import TokenDataset, dataset_format
from megatron.data.order.blendable_dataset import BlendableDataset
from megatron.data.order.gpt_dataset import GPTDataset
from megatron.data.order.index_cache import cached_sample_index
from megatron.data.order.sample_index import num_tokens_in
from megatron.errors import ConfigError, DataError

# NeoX asks more of each part of a blend than its share, against uneven interleaving.
_BLEND_RESERVE = 1.005
_LARGER_SHARE = "Give it a larger share in `split`, more documents, or a smaller seq_length"


@dataclass(frozen=True)
class SampleCounts:
    """Numbers of samples that the indices are built for [samples].

    They decide the number of epochs that are shuffled together, so a run that resumes must keep them.
    """

    train: int
    valid: int
    test: int


@dataclass(frozen=True)
class Datasets:
    """The datasets of a run; None where one is not configured or no sample of it is needed."""

    train: GPTDataset | BlendableDataset
    valid: GPTDataset | BlendableDataset | None
    test: GPTDataset | BlendableDataset | None


def sample_counts(training: TrainingConfig, global_batch_size: int) -> SampleCounts:
    """Counts what a run needs: all training steps, every validation with one more at the end, one test."""
    validations = training.train_iters // training.eval_interval + 1
    return SampleCounts(
        train=training.train_iters * global_batch_size,
        valid=validations * training.eval_iters * global_batch_size,
        test=training.eval_iters * global_batch_size,
    )


def build_datasets(data: DataConfig, counts: SampleCounts, *, seq_length: int, seed: int, vocab_size: int) -> Datasets:
    """Builds datasets that serve `counts` samples of `seq_length` + 1 tokens.

    With `data_path`, they are contiguous ranges of its documents; otherwise a blend of each list of paths. `vocab_size`
    is the padded vocabulary, above which a token id is an error. Raises ConfigError when no training data is
    configured, DataError when a dataset is missing, damaged or too small.
    """
    reader = _SampleReader(data.impl, data.index_cache_dir, seq_length, seed, vocab_size)
    if data.data_path is not None:
        return _split_datasets(data.data_path, data.split, counts, reader)
    if data.train_data_paths is None:
        raise ConfigError("data_path: no training data. Give data_path, or train_data_paths and valid_data_paths.")
    return Datasets(
        train=_blend("train", data.train_data_paths, data.train_data_weights, counts.train, reader),
        valid=_optional_blend("valid", data.valid_data_paths, data.valid_data_weights, counts.valid, reader),
        test=_optional_blend("test", data.test_data_paths, data.test_data_weights, counts.test, reader),
    )


def validation_dataset(
    data: DataConfig, samples: int, *, seq_length: int, seed: int, vocab_size: int
) -> GPTDataset | BlendableDataset:
    """Builds the validation data alone, for `samples` samples of `seq_length` + 1 tokens.

    Raises ConfigError when none is configured, DataError as `build_datasets` does.
    """
    reader = _SampleReader(data.impl, data.index_cache_dir, seq_length, seed, vocab_size)
    if data.data_path is None and data.valid_data_paths is not None:
        return _blend("valid", data.valid_data_paths, data.valid_data_weights, samples, reader)
    shares = split_shares(data.split)
    if data.data_path is None or not shares[1]:
        key = "valid_data_paths" if data.data_path is None else f"split: {data.split!r}"
        raise ConfigError(
            f"{key}: no validation data is configured, and a loss is measured on it. Give `valid_data_paths`, or with "
            "`data_path` a second share in `split`, as in '969, 30, 1'."
        )
    tokens = reader.open(data.data_path)
    key = f"split: {data.split!r}, validation"
    return reader.dataset(tokens, split_documents(shares, len(tokens))[1], samples, key, f"{_LARGER_SHARE}.")


@dataclass(frozen=True)
class _SampleReader:
    """Makes GPTDatasets that differ in their documents and number of samples only."""

    impl: str
    index_cache_dir: str | None
    seq_length: int
    seed: int
    vocab_size: int

    def open(self, prefix: str) -> TokenDataset:
        """Opens the documents of a path. Raises DataError when a file is missing or damaged."""
        return dataset_format(self.impl, Path(prefix)).open(Path(prefix))

    def dataset(self, tokens: TokenDataset, documents: range, num_samples: int, key: str, remedy: str) -> GPTDataset:
        """Builds the dataset of a range of documents.

        Raises DataError, naming the configuration key, when they hold less than one sample.
        """
        num_tokens = num_tokens_in(tokens.sizes, documents)
        if num_tokens <= self.seq_length:
            raise DataError(
                f"{key}: too small. {len(documents):,} documents of {tokens.token_file} hold {num_tokens:,} "
                f"tokens; one sample needs {self.seq_length + 1:,} (seq_length + 1). {remedy}"
            )
        if self.index_cache_dir is None:
            folder = tokens.prefix.with_name(tokens.prefix.name + "_index_cache")
        else:
            folder = Path(self.index_cache_dir)
        index = cached_sample_index(
            tokens.sizes,
            documents,
            num_samples,
            self.seq_length,
            self.seed,
            folder=folder,
            name=tokens.prefix.name,
        )
        return GPTDataset(tokens, index, self.vocab_size, self.seq_length)


def _split_datasets(data_path: str, split: str, counts: SampleCounts, reader: _SampleReader) -> Datasets:
    tokens = reader.open(data_path)
    shares = split_shares(split)
    ranges = split_documents(shares, len(tokens))

    def part(position: int, name: str, num_samples: int, way_out: str) -> GPTDataset:
        key = f"split: {split!r}, {name}"
        return reader.dataset(tokens, ranges[position], num_samples, key, _LARGER_SHARE + way_out)

    unused = "; or do without it: give it a share of 0."
    return Datasets(
        train=part(0, "training", counts.train, "."),
        valid=part(1, "validation", counts.valid, unused) if counts.valid and shares[1] else None,
        test=part(2, "test", counts.test, unused) if counts.test and shares[2] else None,
    )


def split_shares(split: str) -> list[float]:
    """Returns the three shares of NeoX's `split`, as in "969, 30, 1" or "9/1". Missing ones are 0; the sum is 1."""
    numbers = [float(share) for share in split.split("," if "," in split else "/")]
    numbers += [0.0] * (3 - len(numbers))
    total = sum(numbers)
    return [number / total for number in numbers]


def split_documents(shares: Sequence[float], num_documents: int) -> list[range]:
    """Returns contiguous ranges of documents with the given shares.

    As NeoX rounds: the error is taken from every boundary but the first. A range may come out empty, and on very few
    documents the training range absorbs the error.
    """
    boundaries = [0]
    for share in shares:
        boundaries.append(boundaries[-1] + round(share * float(num_documents)))
    error = boundaries[-1] - num_documents
    return [range(start, stop) for start, stop in pairwise([0, *(boundary - error for boundary in boundaries[1:])])]


def _optional_blend(
    part: str, paths: list[str] | None, weights: list[float] | None, num_samples: int, reader: _SampleReader
) -> BlendableDataset | None:
    return _blend(part, paths, weights, num_samples, reader) if paths is not None and num_samples else None


def _blend(
    part: str, paths: list[str], weights: list[float] | None, num_samples: int, reader: _SampleReader
) -> BlendableDataset:
    raw = weights or [1.0] * len(paths)
    total = sum(raw)
    shares = [weight / total for weight in raw]
    remedy = f"Leave it out of {part}_data_paths, or choose a smaller seq_length."
    datasets = []
    for path, share in zip(paths, shares, strict=True):
        tokens = reader.open(path)
        needed = math.ceil(num_samples * share * _BLEND_RESERVE)
        datasets.append(reader.dataset(tokens, range(len(tokens)), needed, f"{part}_data_paths: {path}", remedy))
    return BlendableDataset(datasets, shares)
