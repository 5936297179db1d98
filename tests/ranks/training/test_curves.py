"""Training in every layout gives the same losses and gradient norms: 20 steps in fp32, clipped in every step.

Each run is held against one rank without accumulation or recomputation, and against plain torch in float64.
`make test` runs a cover of all pairs of choices, `make test-full` all combinations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megatron.config.load_config import load_config
from megatron.model.causal_lm import VocabSize, build_local
from tests.helpers.configs import PYTHIA, TOKENFORMER, VOCAB_SIZE, layout_keys, write_dataset
from tests.helpers.covers import pairs, pairwise_cover
from tests.helpers.plain_torch import PlainRun
from tests.helpers.training import Curve, train_on_ranks

STEPS, BATCH, CLIP = 20, 8, 0.5
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-6, 1e-5
BASES = {"tokenformer": TOKENFORMER, "pythia": PYTHIA}
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
"""(tensor, pipe, data) parallel sizes."""


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str
    layout: tuple[int, int, int]
    tied: bool
    accumulation: int = 1
    recomputed: bool = False
    sequence_parallel: bool = False

    def __str__(self) -> str:
        words = [self.model, "tp{}-pp{}-dp{}".format(*self.layout), "tied" if self.tied else "untied"]
        words += [f"accumulate{self.accumulation}"] * (self.accumulation > 1)
        words += ["recomputed"] * self.recomputed + ["sequence"] * self.sequence_parallel
        return "-".join(words)

    def settings(self) -> dict[str, Any]:
        """The YAML's keys. The global batch is the same in every layout."""
        choices = {
            "no_weight_tying": not self.tied,
            "sequence_parallel": self.sequence_parallel,
            "checkpoint_activations": self.recomputed,
            "gradient_clipping": CLIP,
            "train_iters": STEPS,
        }
        return BASES[self.model] | layout_keys(*self.layout, batch=BATCH, accumulation=self.accumulation) | choices

    @property
    def ranks(self) -> int:
        tensor, pipe, data = self.layout
        return tensor * pipe * data


ALL_CASES = [
    Case(*choices)
    for choices in product(BASES, LAYOUTS, [True, False], [1, 4], [False, True], [False, True])
    if not choices[-1] or choices[1][0] > 1
]


COVER = pairwise_cover(ALL_CASES, astuple)


@pytest.fixture(scope="module")
def data_keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("dataset")
    return {"data_path": str(write_dataset(folder / "text_document")), "index_cache_dir": str(folder / "index")}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, data_keys: dict[str, str]) -> Callable[..., Curve]:
    """Train a case, on all of its ranks alike; each case once."""
    folder = tmp_path_factory.mktemp("runs")
    done: dict[Any, Curve] = {}

    def run(case: Case, **changes: Any) -> Curve:
        key = (case, *changes.items())
        if key not in done:
            first, *others = train_on_ranks(case.settings() | data_keys | changes, folder, case.ranks)
            assert len(first) == STEPS
            assert all(other == first for other in others), "losses and norms differ between ranks"
            done[key] = first
        return done[key]

    return run


@pytest.fixture(scope="module")
def plain_curve(tmp_path_factory: pytest.TempPathFactory, data_keys: dict[str, str]) -> Callable[..., Curve]:
    """The same training in float64, from the run's initial weights."""
    done: dict[Any, Curve] = {}

    def run(model: str, tied: bool, **changes: Any) -> Curve:
        key = (model, tied, *changes.items())
        if key not in done:
            settings = Case(model, (1, 1, 1), tied).settings() | data_keys | changes
            config = tmp_path_factory.mktemp("plain") / "config.yml"
            config.write_text("\n".join(f"{key}: {value!r}" for key, value in settings.items()))
            training = load_config([config]).run
            whole = build_local(training.model, VocabSize(VOCAB_SIZE, VOCAB_SIZE), training.training.seed)
            weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
            done[key] = list(PlainRun(settings, BATCH, STEPS).follow(weights, Path(data_keys["data_path"])))
        return done[key]

    return run


def largest_differences(ours: Curve, theirs: Curve) -> tuple[float, float]:
    """Of losses and of norms."""
    losses, norms = zip(*((abs(a - c), abs(b - d)) for (a, b), (c, d) in zip(ours, theirs, strict=True)), strict=True)
    return max(losses), max(norms)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[] if case in COVER else pytest.mark.full) for case in ALL_CASES]
)
def test_curves_do_not_depend_on_the_layout(
    case: Case, train: Callable[..., Curve], plain_curve: Callable[..., Curve]
) -> None:
    curve = train(case)
    assert all(norm > CLIP for _, norm in curve), "clipping was not active"
    assert curve[-1][0] < curve[0][0] - 0.1, "nothing was learned"
    for reference in (train(Case(case.model, (1, 1, 1), case.tied)), plain_curve(case.model, case.tied)):
        loss, norm = largest_differences(curve, reference)
        assert loss <= LOSS_TOLERANCE
        assert norm <= NORM_TOLERANCE


def test_the_cover_has_every_pair_of_choices() -> None:
    made = set().union(*(pairs(astuple(case)) for case in COVER))
    assert made == set().union(*(pairs(astuple(case)) for case in ALL_CASES))
    assert len(ALL_CASES) == 160
    assert len(COVER) <= 20


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
    case: Case, train: Callable[..., Curve], plain_curve: Callable[..., Curve]
) -> None:
    """With eod_mask_loss, micro batches and ranks differ in how many positions count."""
    masked = {"eod_mask_loss": True}
    curve, reference = train(case, **masked), plain_curve(case.model, case.tied, **masked)
    loss, norm = largest_differences(curve, reference)
    assert loss <= LOSS_TOLERANCE
    assert norm <= NORM_TOLERANCE
    assert largest_differences(reference, plain_curve(case.model, case.tied))[0] > 1e-3, "nothing was masked"


def test_groups_that_the_ranks_do_not_divide_evenly(train: Callable[..., Curve]) -> None:
    """The last rank's partition ends in padding."""
    alone, halved = (Case("pythia", (1, 1, data), tied=False) for data in (1, 4))
    odd = {"hidden_size": 36, "num_layers": 3}
    loss, norm = largest_differences(train(halved, **odd), train(alone, **odd))
    assert loss <= LOSS_TOLERANCE
    assert norm <= NORM_TOLERANCE


@pytest.mark.parametrize("method", ["uniform", "parameters"])
def test_how_layers_are_spread_does_not_matter(method: str, train: Callable[..., Curve]) -> None:
    alone, staged = (Case("tokenformer", (1, pipe, 1), tied=True) for pipe in (1, 2))
    loss, norm = largest_differences(train(staged, pipe_partition_method=method), train(alone))
    assert loss <= LOSS_TOLERANCE
    assert norm <= NORM_TOLERANCE


BF16_CASES = [
    Case(
        model,
        layout,
        tied=model == "tokenformer",
        accumulation=1 if layout[0] > 1 else 4,
        sequence_parallel=layout[0] > 1,
    )
    for model, layout in product(BASES, LAYOUTS[1:])
]
BF16_COVER = [
    case
    for case in BF16_CASES
    if (case.model, case.layout)
    in {("tokenformer", (2, 2, 1)), ("tokenformer", (1, 2, 2)), ("pythia", (2, 1, 1)), ("pythia", (1, 1, 2))}
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=[] if case in BF16_COVER else pytest.mark.full) for case in BF16_CASES],
)
def test_bf16_curves_stay_in_their_band(case: Case, train: Callable[..., Curve]) -> None:
    """Layouts round to bf16 at other points, so their curves differ from one another as much as from fp32.

    The band is three times the largest difference between the curves in fp32 and in bf16 on one rank. A gradient that
    is not summed over ranks moves the norm by a factor of at least sqrt(2), out of the band by far.
    """
    alone = Case(case.model, (1, 1, 1), case.tied)
    exact = train(alone)
    loss_unit, norm_unit = largest_differences(train(alone, precision="bfloat16"), exact)
    assert loss_unit < 0.01 and norm_unit < 0.02
    loss, norm = largest_differences(train(case, precision="bfloat16"), exact)
    assert loss <= 3 * loss_unit
    assert norm <= 3 * norm_unit
