"""Training in every layout gives the same losses and gradient norms: 20 steps in fp32, clipped in every step.

Each run is held against one rank without accumulation or recomputation, and against plain torch in float64.
`make test` runs a cover of all pairs of choices, `make test-full` all combinations.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron.config.load_config import load_config
from megatron.data.formats.mmap import IndexedDataset, IndexedDatasetWriter
from megatron.model.causal_lm import VocabSize, build_local
from tests.helpers.configs import VOCAB_SIZE
from tests.helpers.covers import covered
from tests.helpers.layout_runs import (
    ALL_CASES,
    BATCH,
    BF16_CASES,
    BF16_COVER,
    CLIP,
    COVER,
    STEPS,
    Case,
    Curve,
    LayoutRuns,
)
from tests.helpers.plain_torch import PlainRun

LOSS_TOLERANCE, NORM_TOLERANCE = 1e-6, 1e-5


@pytest.fixture(scope="module")
def plain_curve(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Callable[..., Curve]:
    """The same training in float64, from the run's initial weights."""
    done: dict[Any, Curve] = {}

    def run(model: str, tied: bool, **changes: Any) -> Curve:
        key = (model, tied, *changes.items())
        if key not in done:
            settings = Case(model, (1, 1, 1), tied).keys() | changes
            config = tmp_path_factory.mktemp("plain") / "config.yml"
            config.write_text(yaml.safe_dump(settings | {"data_path": str(dataset)}))
            training = load_config([config]).run
            whole = build_local(training.model, VocabSize(VOCAB_SIZE, VOCAB_SIZE), training.training.seed)
            weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
            done[key] = list(PlainRun(settings, BATCH, STEPS).follow(weights, dataset))
        return done[key]

    return run


def largest_differences(ours: Curve, theirs: Curve) -> tuple[float, float]:
    """Returns the largest difference of losses, and that of norms."""
    losses, norms = zip(*((abs(a - c), abs(b - d)) for (a, b), (c, d) in zip(ours, theirs, strict=True)), strict=True)
    return max(losses), max(norms)


def assert_same_curve(ours: Curve, theirs: Curve) -> None:
    loss, norm = largest_differences(ours, theirs)
    assert loss <= LOSS_TOLERANCE
    assert norm <= NORM_TOLERANCE


@pytest.mark.parametrize("case", covered(ALL_CASES, COVER))
def test_curves_do_not_depend_on_the_layout(
    case: Case, layout_runs: LayoutRuns, plain_curve: Callable[..., Curve]
) -> None:
    curve = layout_runs.trained(case).curve
    assert len(curve) == STEPS
    assert all(norm > CLIP for _, norm in curve), "clipping was not active"
    assert curve[-1][0] < curve[0][0] - 0.1, "nothing was learned"
    assert_same_curve(curve, layout_runs.trained(case.alone).curve)
    assert_same_curve(curve, plain_curve(case.model, case.tied))


@pytest.mark.parametrize(
    "case",
    [
        Case("tokenformer", (1, 1, 1), tied=True),
        Case("tokenformer", (1, 1, 2), tied=True, accumulation=4),
        Case("pythia", (2, 1, 1), tied=False, accumulation=2),
        Case("pythia", (1, 2, 2), tied=False),
    ],
    ids=str,
)
def test_positions_that_count_weigh_the_same_in_every_layout(
    case: Case, layout_runs: LayoutRuns, plain_curve: Callable[..., Curve]
) -> None:
    """With eod_mask_loss, micro batches and ranks differ in how many positions count."""
    reference = plain_curve(case.model, case.tied, eod_mask_loss=True)
    assert_same_curve(layout_runs.trained(case, eod_mask_loss=True).curve, reference)
    assert largest_differences(reference, plain_curve(case.model, case.tied))[0] > 1e-3, "nothing was masked"


@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    [
        Case("tokenformer", (1, 1, 2), tied=True, accumulation=4),
        Case("pythia", (1, 2, 2), tied=False),
        Case("pythia", (2, 1, 1), tied=False, accumulation=2),
    ],
    ids=str,
)
def test_labels_of_a_dataset_weigh_the_same_in_every_layout(case: Case, dataset: Path, tmp_path: Path) -> None:
    """Labels that mask the first token of each document are eod_mask_loss, which is compared with plain torch above."""
    tokens = IndexedDataset(dataset)
    with IndexedDatasetWriter(tmp_path / "label", np.int32) as writer:
        for number in range(len(tokens)):
            writer.add_document([-100, *tokens[number][1:]])
    masked, labelled = LayoutRuns(tmp_path, dataset), LayoutRuns(tmp_path, dataset)
    paths = {"train_data_paths": [str(dataset)], "index_cache_dir": str(tmp_path / "index")}
    masked.data = paths | {"eod_mask_loss": True, "save": str(tmp_path / "masked")}
    labelled.data = paths | {"train_label_data_paths": [str(tmp_path / "label")], "save": str(tmp_path / "labelled")}
    assert_same_curve(labelled.trained(case).curve, masked.trained(case.alone).curve)


def test_groups_that_the_ranks_do_not_divide_evenly(layout_runs: LayoutRuns) -> None:
    """The last rank's partition ends in padding."""
    alone, quartered = (
        layout_runs.trained(Case("pythia", (1, 1, data), tied=False), hidden_size=36, num_layers=3) for data in (1, 4)
    )
    assert_same_curve(quartered.curve, alone.curve)


@pytest.mark.parametrize("method", ["uniform", "parameters"])
def test_how_layers_are_spread_does_not_matter(method: str, layout_runs: LayoutRuns) -> None:
    staged = Case("tokenformer", (1, 2, 1), tied=True)
    spread = layout_runs.trained(staged, pipe_partition_method=method)
    assert_same_curve(spread.curve, layout_runs.trained(staged.alone).curve)


@pytest.mark.parametrize("case", covered(BF16_CASES, BF16_COVER))
def test_bf16_curves_stay_in_their_band(case: Case, layout_runs: LayoutRuns) -> None:
    """Layouts round to bf16 at other points, so their curves differ from one another as much as from fp32.

    The band is three times the largest difference between the curves in fp32 and in bf16 on one rank. A gradient that
    is not summed over ranks moves the norm by a factor of at least sqrt(2), out of the band by far.
    """
    exact = layout_runs.trained(case.alone).curve
    rounded = layout_runs.trained(case.alone, precision="bfloat16").curve
    loss_unit, norm_unit = largest_differences(rounded, exact)
    assert loss_unit < 0.01 and norm_unit < 0.02
    loss, norm = largest_differences(layout_runs.trained(case, precision="bfloat16").curve, exact)
    assert loss <= 3 * loss_unit
    assert norm <= 3 * norm_unit
