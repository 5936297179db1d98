"""Builds the training, validation and test datasets of a configuration, with NeoX's splits and sample counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np

from megatron.config.sections.data import DataConfig
from megatron.config.sections.training import TrainingConfig
from megatron.data.dataset_format import TokenDataset, dataset_format
from megatron.data.order.blendable_dataset import BlendableDataset
from megatron.data.order.gpt_dataset import GPTDataset
from megatron.data.order.index_cache import cached_sample_index
from megatron.data.order.preshuffled_dataset import PreshuffledDataset
from megatron.data.order.sample_index import num_tokens_in
from megatron.errors import ConfigError, DataError

# NeoX asks more of each part of a blend than its share, against uneven interleaving.
_BLEND_RESERVE = 1.005


SampleDataset = GPTDataset | BlendableDataset | PreshuffledDataset


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

    train: SampleDataset
    valid: SampleDataset | None
    test: SampleDataset | None
    index_keys: dict[str, str]
    """Name of each cached index, by what was asked for; building with them looks through nothing again."""


def sample_counts(training: TrainingConfig, global_batch_size: int) -> SampleCounts:
    """Counts what a run needs: all training steps, every validation with one more at the end, one test."""
    validations = training.train_iters // training.eval_interval + 1
    return SampleCounts(
        train=training.train_iters * global_batch_size,
        valid=validations * training.eval_iters * global_batch_size,
        test=training.eval_iters * global_batch_size,
    )


def build_datasets(
    data: DataConfig,
    counts: SampleCounts,
    *,
    seq_length: int,
    seed: int,
    vocab_size: int,
    index_keys: Mapping[str, str] | None = None,
) -> Datasets:
    """Builds datasets that serve `counts` samples of `seq_length` + 1 tokens.

    Indices are looked through whole, and built where they are not cached. With the `index_keys` of a process of this
    machine that has done so, they are only mapped.

    With `data_path`, they are contiguous ranges of its documents; otherwise a blend of each list of paths. `vocab_size`
    is the padded vocabulary, above which a token id is an error. Raises ConfigError when no training data is
    configured, DataError when a dataset is missing, damaged or too small.
    """
    reader = _SampleReader(
        data.impl,
        data.index_cache_dir,
        seq_length,
        seed,
        vocab_size,
        data.preshuffled,
        index_keys is not None,
        dict(index_keys or {}),
    )
    if data.data_path is not None:
        return _split_datasets(data.data_path, data.split, counts, reader)
    if data.train_data_paths is None:
        raise ConfigError("data_path: no training data. Give data_path, or train_data_paths and valid_data_paths.")
    train = _blend(_Part.of(data, "train"), counts.train, reader)
    return Datasets(
        train=train,
        valid=_blend(_Part.of(data, "valid"), counts.valid, reader) if data.valid_data_paths and counts.valid else None,
        test=_blend(_Part.of(data, "test"), counts.test, reader) if data.test_data_paths and counts.test else None,
        index_keys=reader.index_keys,
    )


@dataclass(frozen=True)
class _SampleReader:
    """Makes GPTDatasets that differ in their documents and number of samples only."""

    impl: str
    index_cache_dir: str | None
    seq_length: int
    seed: int
    vocab_size: int
    preshuffled: bool
    is_checked: bool
    """Another process of this machine has looked through datasets and indices, and found `index_keys`."""
    index_keys: dict[str, str]

    def open(self, prefix: str) -> TokenDataset:
        """Opens the documents of a path. Raises DataError when a file is missing or damaged."""
        files = dataset_format(self.impl, Path(prefix))
        return (files.open_checked if self.is_checked and files.open_checked else files.open)(Path(prefix))

    def dataset(
        self,
        tokens: TokenDataset,
        documents: range,
        num_samples: int,
        key: str,
        remedy: str,
        labels: TokenDataset | None = None,
    ) -> GPTDataset | PreshuffledDataset:
        """Builds the dataset of a range of documents.

        Raises DataError, naming the configuration key, when they hold less than one sample.
        """
        num_tokens = num_tokens_in(tokens.sizes, documents)
        if num_tokens <= self.seq_length:
            raise DataError(
                f"{key}: too small. {len(documents):,} documents of {tokens.token_file} hold {num_tokens:,} "
                f"tokens; one sample needs {self.seq_length + 1:,} (seq_length + 1). {remedy}"
            )
        if self.preshuffled:
            if labels is not None:
                raise ConfigError(f"{key}: label_data_paths belong to documents, and `preshuffled` reads rows.")
            return PreshuffledDataset(tokens, documents, self.vocab_size, self.seq_length)
        if self.index_cache_dir is None:
            folder = tokens.prefix.with_name(tokens.prefix.name + "_index_cache")
        else:
            folder = Path(self.index_cache_dir)
        asked = f"{tokens.prefix} {documents} {num_samples}"
        index, self.index_keys[asked] = cached_sample_index(
            tokens.sizes,
            documents,
            num_samples,
            self.seq_length,
            self.seed,
            folder=folder,
            name=tokens.prefix.name,
            checked_key=self.index_keys.get(asked),
        )
        return GPTDataset(tokens, index, self.vocab_size, self.seq_length, labels)

    def open_labels(self, prefix: str, tokens: TokenDataset) -> TokenDataset:
        """Opens the labels of `tokens`. Raises DataError when they are of other documents."""
        labels = self.open(prefix)
        if not self.is_checked and not np.array_equal(labels.sizes, tokens.sizes):
            raise DataError(
                f"{labels.token_file}: has labels of other documents than those of {tokens.token_file}: their lengths "
                "differ. Both come from one run of preprocess_data.py."
            )
        return labels


def _split_datasets(data_path: str, split: str, counts: SampleCounts, reader: _SampleReader) -> Datasets:
    tokens = reader.open(data_path)
    shares = split_shares(split)
    ranges = split_documents(shares, len(tokens))
    remedy = "Give it a larger share in `split`, more documents, or a smaller seq_length"

    def part(position: int, name: str, num_samples: int, way_out: str) -> GPTDataset | PreshuffledDataset:
        key = f"split: {split!r}, {name}"
        return reader.dataset(tokens, ranges[position], num_samples, key, remedy + way_out)

    unused = "; or do without it: give it a share of 0."
    return Datasets(
        train=part(0, "training", counts.train, "."),
        valid=part(1, "validation", counts.valid, unused) if counts.valid and shares[1] else None,
        test=part(2, "test", counts.test, unused) if counts.test and shares[2] else None,
        index_keys=reader.index_keys,
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


def weights_by_num_documents(num_documents: Sequence[int], alpha: float) -> list[float]:
    """Returns weights that sum to 1, by NeoX's rule: in proportion to p ** alpha * (1 - p), p the share of documents.

    The steps are NeoX's (megatron/data/data_utils.py, weights_by_num_docs), so that the last digits are too. A single
    dataset, for which NeoX divides by zero, has weight 1.
    """
    if len(num_documents) == 1:
        return [1.0]
    total = sum(num_documents)
    shares = [documents / total for documents in num_documents]
    raised = _normalized([share**alpha for share in shares])
    return _normalized([power * (1 - share) for power, share in zip(raised, shares, strict=True)])


def _normalized(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [weight / total for weight in weights]


@dataclass(frozen=True)
class _Part:
    """The datasets of training, validation or test, where each has paths of its own."""

    name: str
    paths: list[str]
    label_paths: list[str] | None
    weights: list[float] | None
    alpha: float | None
    """Exponent of weights by the number of documents; None leaves them to `weights`."""

    @classmethod
    def of(cls, data: DataConfig, name: str) -> Self:
        return cls(
            name,
            getattr(data, f"{name}_data_paths"),
            getattr(data, f"{name}_label_data_paths"),
            getattr(data, f"{name}_data_weights"),
            data.weighted_sampler_alpha if data.weight_by_num_documents else None,
        )


def _blend(part: _Part, num_samples: int, reader: _SampleReader) -> SampleDataset:
    opened = [reader.open(path) for path in part.paths]
    labels: list[TokenDataset | None] = [None] * len(opened)
    if part.label_paths is not None:
        labels = [reader.open_labels(path, tokens) for path, tokens in zip(part.label_paths, opened, strict=True)]
    raw = part.weights or [1.0] * len(opened)
    if part.alpha is not None:
        raw = weights_by_num_documents([len(tokens) for tokens in opened], part.alpha)
    shares = _normalized(raw)
    remedy = f"Leave it out of {part.name}_data_paths, or choose a smaller seq_length."
    datasets = []
    for path, tokens, its_labels, share in zip(part.paths, opened, labels, shares, strict=True):
        needed = math.ceil(num_samples * share * _BLEND_RESERVE)
        key = f"{part.name}_data_paths: {path}"
        datasets.append(reader.dataset(tokens, range(len(tokens)), needed, key, remedy, its_labels))
    if isinstance(datasets[0], PreshuffledDataset):
        if len(datasets) > 1:
            raise ConfigError(
                f"{part.name}_data_paths: {len(datasets)} datasets, but `preshuffled` reads one in the order in which "
                "it lies. Merge them (tools/datasets/merge_datasets.py), or leave `preshuffled` out to blend documents."
            )
        return datasets[0]
    return BlendableDataset([dataset for dataset in datasets if isinstance(dataset, GPTDataset)], shares)
