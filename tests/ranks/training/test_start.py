"""Ranks hold and read what no layout changes: full weights, data order, replicas, shares of optimizer state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml

from megatron.config.load_config import load_config
from megatron.model.causal_lm import VocabSize, build_local
from tests.helpers.configs import SEQ_LENGTH, TOKENFORMER, VOCAB_SIZE
from tests.helpers.layout_runs import BATCH, BF16_COVER, COVER, STEPS, Case, LayoutRuns, RankRecord
from tools.datasets import batch_viewer


@pytest.mark.parametrize("case", COVER, ids=str)
def test_full_weights_are_those_of_the_seed(case: Case, layout_runs: LayoutRuns, tmp_path: Path) -> None:
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(case.keys()))
    run = load_config([config]).run
    whole = dict(build_local(run.model, VocabSize(VOCAB_SIZE, VOCAB_SIZE), run.training.seed).named_parameters())
    ranks = layout_runs.trained(case).ranks
    assert set().union(*(rank.first_weights for rank in ranks)) == whole.keys()
    for name, weight in whole.items():
        shares: dict[int, torch.Tensor] = {}
        for rank in ranks:
            if name in rank.first_weights:
                # Data-parallel ranks, and the stages of a tied embedding, hold the same.
                share = rank.first_weights[name]
                assert torch.equal(share, shares.setdefault(rank.tensor_rank, share)), name
        assert sorted(shares) == list(range(case.layout[0]))
        dims = {rank.split_dims[name] for rank in ranks if name in rank.split_dims}
        assert len(dims) == 1
        dim = dims.pop()
        if dim is None:
            assert all(torch.equal(share, weight) for share in shares.values()), name
        else:
            assert torch.equal(torch.cat([shares[rank] for rank in sorted(shares)], dim), weight), name


Rows = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def viewed(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Callable[..., Rows]:
    """Rows [step, sample, token] of all steps, as the batch viewer shows them."""
    done: dict[Any, Rows] = {}

    def view(**changes: Any) -> Rows:
        key = tuple(changes.items())
        if key not in done:
            folder = tmp_path_factory.mktemp("viewer")
            config, output = folder / "config.yml", folder / "batches.npy"
            settings = TOKENFORMER | {"data_path": str(dataset), "index_cache_dir": str(folder), "train_iters": STEPS}
            settings |= {"train_batch_size": BATCH} | changes
            del settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]
            config.write_text(yaml.safe_dump(settings))
            batch_viewer.main([str(config), "--start", "1", "--end", str(STEPS), "--output", str(output)])
            done[key] = np.load(output)
            assert done[key].shape == (STEPS, BATCH, SEQ_LENGTH + 1)
        return done[key]

    return view


def assert_ranks_read(ranks: list[RankRecord], layout: tuple[int, int, int], want: Rows) -> None:
    """Compares what the data-parallel ranks read together, on each stage and tensor-parallel rank, with `want`."""
    tensor, pipe, data = layout
    for tensor_rank in range(tensor):
        for pipe_rank in range(pipe):
            group = [rank for rank in ranks if (rank.tensor_rank, rank.pipe_rank) == (tensor_rank, pipe_rank)]
            by_data_rank = [rank.rows for rank in sorted(group, key=lambda rank: rank.data_rank)]
            assert len(by_data_rank) == data
            rows = [micro for micros in zip(*by_data_rank, strict=True) for micro in micros]
            np.testing.assert_array_equal(np.concatenate(rows).reshape(want.shape), want)


@pytest.mark.parametrize("case", COVER, ids=str)
def test_ranks_read_what_the_batch_viewer_shows(
    case: Case, layout_runs: LayoutRuns, viewed: Callable[..., Rows]
) -> None:
    assert_ranks_read(layout_runs.trained(case).ranks, case.layout, viewed())


def test_ranks_read_over_the_end_of_an_epoch(layout_runs: LayoutRuns, viewed: Callable[..., Rows]) -> None:
    few = {"split": "2, 90, 8"}
    case = Case("tokenformer", (1, 1, 4), tied=True, accumulation=2)
    assert_ranks_read(layout_runs.trained(case, **few).ranks, case.layout, viewed(**few))


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        *((case, {}) for case in COVER),
        *((case, {"precision": "bfloat16"}) for case in BF16_COVER),
        (Case("pythia", (1, 1, 4), tied=False), {"hidden_size": 36, "num_layers": 3}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) or "fp32" if isinstance(value, dict) else str(value),
)
def test_optimizer_state_is_partitioned(case: Case, changes: dict[str, Any], layout_runs: LayoutRuns) -> None:
    data_size = case.layout[2]
    for rank in layout_runs.trained(case, **changes).ranks:
        weights = sum(weight.numel() for weight in rank.last_weights.values())
        for elements in rank.optimizer_elements.values():
            # Each of the two parameter groups is padded to two elements per rank.
            assert weights / data_size <= elements <= weights / data_size + 4
