"""Splits, blends and counts are NeoX's; what is too small is named."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron.config.optimizers.adamw import AdamWConfig
from megatron.config.sections.data import DataConfig
from megatron.config.sections.training import TrainingConfig
from megatron.data.datasets import (
    Datasets,
    SampleCounts,
    build_datasets,
    sample_counts,
    split_documents,
    split_shares,
    weights_by_num_documents,
)
from megatron.data.formats.mmap import IndexedDatasetWriter
from megatron.data.order.blendable_dataset import BlendableDataset
from megatron.data.order.gpt_dataset import GPTDataset
from megatron.data.order.sample_index import build_sample_index
from megatron.errors import ConfigError, DataError

SEQ_LENGTH = 4


def write(prefix: Path, num_documents: int, first_token: int = 0) -> str:
    """Documents of 10 tokens that tell their dataset and document: first_token + document."""
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in range(num_documents):
            writer.add_document([first_token + document] * 10)
    return str(prefix)


def build(data: DataConfig, counts: SampleCounts) -> Datasets:
    return build_datasets(data, counts, seq_length=SEQ_LENGTH, seed=3, vocab_size=1024)


def documents_of(dataset: GPTDataset | BlendableDataset | None) -> list[int]:
    assert isinstance(dataset, GPTDataset)
    return sorted(set(dataset.index.doc_idx.tolist()))


# Boundaries by hand: round() of share x documents, half to even, then the excess off every boundary but the first.
@pytest.mark.parametrize(
    ("split", "num_documents", "boundaries"),
    [
        ("969, 30, 1", 1000, [0, 969, 999, 1000]),
        ("969,30,1", 64, [0, 62, 64, 64]),
        ("1,1,1", 10, [0, 4, 7, 10]),  # 3 + 3 + 3: one document is missing, and every boundary moves up
        ("1,1,1", 11, [0, 3, 7, 11]),  # 4 + 4 + 4: one too many, and every boundary moves down
        ("5/3/2", 7, [0, 4, 6, 7]),  # 3.5 -> 4, 2.1 -> 2, 1.4 -> 1
        ("1", 9, [0, 9, 9, 9]),
        ("9,1", 20, [0, 18, 20, 20]),
        ("0.5,0.5", 5, [0, 3, 5, 5]),  # 2.5 -> 2 twice
    ],
)
def test_split_boundaries(split: str, num_documents: int, boundaries: list[int]) -> None:
    ranges = split_documents(split_shares(split), num_documents)
    assert [ranges[0].start, *(part.stop for part in ranges)] == boundaries
    assert all(before.stop == after.start for before, after in pairwise(ranges))


def test_counts_of_a_run() -> None:
    training = TrainingConfig(train_iters=143, eval_interval=40, eval_iters=10, optimizer=AdamWConfig(lr=1e-3))
    assert sample_counts(training, 32) == SampleCounts(train=143 * 32, valid=4 * 10 * 32, test=10 * 32)


def test_split_dataset(tmp_path: Path) -> None:
    data = DataConfig(data_path=write(tmp_path / "corpus", 40), split="8,1,1")
    datasets = build(data, SampleCounts(200, 10, 5))
    assert documents_of(datasets.train) == list(range(32))
    assert documents_of(datasets.valid) == list(range(32, 36))
    assert documents_of(datasets.test) == list(range(36, 40))
    assert isinstance(datasets.valid, GPTDataset)
    want = build_sample_index(np.full(40, 10, dtype=np.int32), range(32, 36), 10, SEQ_LENGTH, 3)
    np.testing.assert_array_equal(datasets.valid.index.shuffle_idx, want.shuffle_idx)
    np.testing.assert_array_equal(datasets.valid.index.sample_idx, want.sample_idx)
    assert len(list((tmp_path / "corpus_index_cache").glob("*.npy"))) == 9


def test_cache_folder_is_the_configured_one(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus", 40)
    build(DataConfig(data_path=path, split="1", index_cache_dir=str(tmp_path / "elsewhere")), SampleCounts(5, 0, 0))
    assert len(list((tmp_path / "elsewhere").glob("corpus_*.npy"))) == 3
    assert not (tmp_path / "corpus_index_cache").exists()


def test_parts_that_are_not_needed_or_have_no_share(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus", 40)
    unneeded = build(DataConfig(data_path=path, split="8,1,1"), SampleCounts(200, 0, 0))
    assert (unneeded.valid, unneeded.test) == (None, None)
    no_share = build(DataConfig(data_path=path, split="9,1,0"), SampleCounts(200, 10, 10))
    assert no_share.valid is not None
    assert no_share.test is None


def test_blend_of_weighted_parts(tmp_path: Path) -> None:
    paths = [write(tmp_path / "small", 3), write(tmp_path / "large", 200, first_token=500)]
    data = DataConfig(
        train_data_paths=paths, train_data_weights=[1.0, 3.0], valid_data_paths=paths[1:], test_data_paths=None
    )
    datasets = build(data, SampleCounts(400, 50, 50))
    assert isinstance(datasets.train, BlendableDataset)
    assert datasets.test is None
    # ceil(400 x 1/4 x 1.005) = 101 samples of 4 tokens from 30 tokens an epoch, ceil(400 x 3/4 x 1.005) = 302 of 2000.
    for part, (num_documents, num_samples) in enumerate([(3, 101), (200, 302)]):
        sizes = np.full(num_documents, 10, dtype=np.int32)
        want = build_sample_index(sizes, range(num_documents), num_samples, SEQ_LENGTH, 3)
        np.testing.assert_array_equal(datasets.train.datasets[part].index.shuffle_idx, want.shuffle_idx)
    assert len(datasets.train) == sum(len(part) for part in datasets.train.datasets)
    from_small = [datasets.train[item].max() < 500 for item in range(400)]
    assert sum(from_small) == 100
    assert isinstance(datasets.valid, BlendableDataset)
    assert datasets.valid[0].min() >= 500


def test_parts_weigh_the_same_unless_told(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a", 60), write(tmp_path / "b", 60, first_token=500)]
    datasets = build(DataConfig(train_data_paths=paths), SampleCounts(100, 0, 0))
    assert sum(datasets.train[item].max() < 500 for item in range(100)) == 50


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("98,1,1", r"split: '98,1,1', validation: too small\. 0 documents of .*corpus\.bin hold 0 tokens; .* 5 "),
        ("2,98,0", r"split: '2,98,0', training: too small\. 0 documents"),
        ("80,18,2", r"split: '80,18,2', test: too small\..*a share of 0"),
    ],
)
def test_split_without_a_document(tmp_path: Path, split: str, message: str) -> None:
    data = DataConfig(data_path=write(tmp_path / "corpus", 12), split=split)
    with pytest.raises(DataError, match=message):
        build(data, SampleCounts(10, 10, 10))


def test_fewer_tokens_than_one_sample(tmp_path: Path) -> None:
    data = DataConfig(train_data_paths=[write(tmp_path / "a", 9), write(tmp_path / "tiny", 1)])
    with pytest.raises(DataError, match=r"train_data_paths: .*tiny: too small\. 1 documents .* hold 10 tokens; .* 12 "):
        build_datasets(data, SampleCounts(10, 0, 0), seq_length=11, seed=3, vocab_size=1024)


def test_missing_dataset_and_missing_configuration(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.idx: no such file"):
        build(DataConfig(data_path=str(tmp_path / "nowhere")), SampleCounts(1, 1, 1))
    with pytest.raises(ConfigError, match="data_path: no training data"):
        build(DataConfig(), SampleCounts(1, 1, 1))


def neox_weights(counts: list[int], alpha: float) -> list[Fraction]:
    """The rule in exact numbers: p ** alpha * (1 - p), normalized; `alpha` is whole here."""
    shares = [Fraction(count, sum(counts)) for count in counts]
    weights = [share ** int(alpha) * (1 - share) for share in shares]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("counts", [[1, 1], [3, 1, 7], [210_000_000, 5, 12_345], list(range(1, 101))])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_weights_by_number_of_documents(counts: list[int], alpha: float) -> None:
    expected = [float(weight) for weight in neox_weights(counts, alpha)]
    np.testing.assert_allclose(weights_by_num_documents(counts, alpha), expected, rtol=1e-12)


def test_a_fractional_exponent_favours_small_datasets() -> None:
    shares = np.array([9, 1]) / 10
    expected = shares**0.3 * (1 - shares)
    np.testing.assert_allclose(weights_by_num_documents([90, 10], 0.3), expected / expected.sum(), rtol=1e-12)
    assert weights_by_num_documents([5], 0.3) == [1.0]


def test_documents_weigh_a_blend(tmp_path: Path) -> None:
    """As NeoX: in place of the given weights, which do not matter then."""
    paths = []
    for name, documents in (("a", 30), ("b", 90)):
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            for _ in range(documents):
                writer.add_document(range(20))
        paths.append(str(tmp_path / name))
    by_documents = DataConfig(train_data_paths=paths, train_data_weights=[9, 1], weight_by_num_documents=True)
    explicit = DataConfig(train_data_paths=paths, train_data_weights=weights_by_num_documents([30, 90], 1.0))
    ours, expected = (build(data, SampleCounts(200, 0, 0)).train for data in (by_documents, explicit))
    assert isinstance(ours, BlendableDataset) and isinstance(expected, BlendableDataset)
    np.testing.assert_array_equal(ours.order.choices, expected.order.choices)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    with IndexedDatasetWriter(tmp_path / "rows", np.uint16) as writer:
        for row in range(50):
            writer.add_document(np.full(SEQ_LENGTH + 1, row))
    return tmp_path / "rows"


def test_preshuffled_rows_are_read_in_their_order(rows: Path) -> None:
    whole = DataConfig(train_data_paths=[str(rows)], valid_data_paths=[str(rows)], preshuffled=True)
    datasets = build(whole, SampleCounts(500, 20, 0))
    assert [int(datasets.train[item][0]) for item in range(55)] == [*range(50), *range(5)]
    assert len(datasets.train) == 50 and datasets.train[0].dtype == np.int64
    parts = build(DataConfig(data_path=str(rows), split="8,2,0", preshuffled=True), SampleCounts(500, 20, 0))
    assert parts.valid is not None
    assert (len(parts.train), int(parts.train[39][0]), int(parts.valid[0][0])) == (40, 39, 40)
    assert not list(rows.parent.glob("*index_cache*"))


def test_preshuffled_rows_have_one_length_and_one_dataset(rows: Path) -> None:
    with pytest.raises(ConfigError, match=r"train_data_paths: 2 datasets, but `preshuffled` reads one"):
        build(DataConfig(train_data_paths=[str(rows)] * 2, preshuffled=True), SampleCounts(5, 0, 0))
    with IndexedDatasetWriter(rows, np.uint16) as writer:
        writer.add_document(range(SEQ_LENGTH + 1))
        writer.add_document(range(SEQ_LENGTH + 3))
    with pytest.raises(DataError, match=rf"row 1 has {SEQ_LENGTH + 3} tokens; .* Set seq_length to {SEQ_LENGTH + 2}"):
        build(DataConfig(train_data_paths=[str(rows)], preshuffled=True), SampleCounts(5, 0, 0))


def write_labels(prefix: Path, documents: list[list[int]]) -> str:
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


def test_labels_stand_beside_their_tokens(tmp_path: Path) -> None:
    tokens = write(tmp_path / "text", 20)
    labels = write_labels(tmp_path / "label", [[-100] * 4 + [document] * 6 for document in range(20)])
    data = DataConfig(train_data_paths=[tokens], train_label_data_paths=[labels])
    plain = build(DataConfig(train_data_paths=[tokens]), SampleCounts(60, 0, 0)).train
    ours = build(data, SampleCounts(60, 0, 0)).train
    masked = 0
    for item in range(60):
        sample = ours[item]
        np.testing.assert_array_equal(sample[0], plain[item])
        counted = sample[1] != -100
        np.testing.assert_array_equal(sample[1][counted], sample[0][counted])
        masked += int((~counted).sum())
    assert masked == pytest.approx(0.4 * 60 * (SEQ_LENGTH + 1), rel=0.2)


def test_labels_of_other_documents_are_refused(tmp_path: Path) -> None:
    tokens = write(tmp_path / "text", 20)
    for documents, message in (
        ([[1] * 10] * 19, r"label\.bin: has labels of other documents"),
        ([[1] * 10] * 19 + [[1] * 9], r"label\.bin: has labels of other documents"),
        ([[-7] * 10] * 20, r"label\.bin: document \d+ holds the token id -7"),
        ([[1024] * 10] * 20, r"label\.bin: document \d+ holds the token id 1024"),
    ):
        labels = write_labels(tmp_path / "label", documents)
        data = DataConfig(train_data_paths=[tokens], train_label_data_paths=[labels])
        with pytest.raises(DataError, match=message):
            build(data, SampleCounts(10, 0, 0)).train[0]
