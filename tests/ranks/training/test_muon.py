"""Muon in training: against plain torch in float64 in every layout, resumed, reshaped, converted, in bf16 and grown.

`make test` trains the layout in which a matrix is split between data-parallel ranks.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron.checkpointing.states.read_states import read_states
from megatron.checkpointing.store.checkpoint import read_checkpoint
from megatron.config.load_config import load_config
from megatron.model.causal_lm import VocabSize, build_local
from tests.helpers.configs import VOCAB_SIZE
from tests.helpers.layout_runs import BATCH, CLIP, HALF, STEPS, Case, Curve, LayoutRuns
from tests.helpers.plain_torch import PlainRun
from tests.helpers.runs import run_ranks
from tests.helpers.tensor_files import assert_same_checkpoint
from tools.ckpts import reshape

LOSS_TOLERANCE, NORM_TOLERANCE = 1e-6, 1e-5
MUON: dict[str, Any] = {
    "optimizer": {"type": "Muon", "params": {"lr": 4e-3, "adam_lr": 2e-3, "betas": [0.9, 0.95]}},
    "lr_decay_iters": 30,
}
SPLIT = Case("tokenformer", (1, 1, 2), tied=True, accumulation=2)
"""Two data-parallel ranks, whose partitions of the layers' matrices meet in the middle of one."""
CASES = [
    SPLIT,
    *(
        pytest.param(case, marks=pytest.mark.full)
        for case in [
            Case("tokenformer", (1, 1, 1), tied=True),
            Case("tokenformer", (2, 1, 1), tied=False, accumulation=4, sequence_parallel=True),
            Case("tokenformer", (1, 2, 1), tied=True, accumulation=4, recomputed=True),
            Case("tokenformer", (2, 1, 2), tied=True),
            Case("tokenformer", (2, 2, 1), tied=False),
            Case("tokenformer", (1, 2, 2), tied=True, accumulation=2),
            Case("pythia", (2, 1, 2), tied=False),
            Case("gpt2", (1, 1, 4), tied=True),
            Case("llama", (2, 1, 2), tied=False),
        ]
    ),
]
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1)]


class MuonRuns(LayoutRuns):
    """Runs whose optimizer is Muon."""

    def config(self, name: str, keys: dict[str, Any]) -> Path:
        return super().config(name, keys | MUON)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> LayoutRuns:
    return MuonRuns(tmp_path_factory.mktemp("muon"), dataset)


def plain_curve(case: Case, folder: Path, dataset: Path) -> Curve:
    """The same training in float64, from the run's initial weights."""
    settings = case.alone.keys() | MUON
    config = folder / "plain.yml"
    config.write_text(yaml.safe_dump(settings | {"data_path": str(dataset)}))
    training = load_config([config]).run
    whole = build_local(training.model, VocabSize(VOCAB_SIZE, VOCAB_SIZE), training.training.seed)
    weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    return list(PlainRun(settings, BATCH, STEPS).follow(weights, dataset))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_curves_are_those_of_plain_torch(case: Case, runs: LayoutRuns, tmp_path: Path, dataset: Path) -> None:
    curve = runs.trained(case).curve
    assert all(norm > CLIP for _, norm in curve), "clipping was not active"
    assert curve[-1][0] < curve[0][0] - 0.1, "nothing was learned"
    losses, norms = zip(*curve, strict=True)
    plain_losses, plain_norms = zip(*plain_curve(case, tmp_path, dataset), strict=True)
    assert losses == pytest.approx(plain_losses, abs=LOSS_TOLERANCE, rel=0)
    assert norms == pytest.approx(plain_norms, abs=NORM_TOLERANCE, rel=0)


def test_a_checkpoint_holds_the_moments_of_each_kind_of_parameter(runs: LayoutRuns) -> None:
    checkpoint = read_checkpoint(runs.trained(SPLIT).checkpoint(STEPS))
    kinds = {}
    for layer in read_states(checkpoint):
        for name, state in layer.by_global_name():
            assert all(moment.shape == state.weight.shape and moment.any() for moment in state.moments.values())
            kinds[name] = (tuple(state.moments), state.step)
    assert {kind for name, kind in kinds.items() if name.startswith("layers.")} == {(("momentum_buffer",), None)}
    others = {kind for name, kind in kinds.items() if not name.startswith("layers.")}
    assert others == {(("exp_avg", "exp_avg_sq"), float(STEPS))}


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_a_resumed_run_is_the_uninterrupted_one(precision: str, runs: LayoutRuns) -> None:
    whole = runs.trained(SPLIT, precision=precision)
    keys = SPLIT.keys() | {"precision": precision, "load": str(whole.checkpoint(HALF)), "log_interval": 1}
    name = f"resumed-{precision}"
    finished = run_ranks(runs.config(name, keys), ranks=SPLIT.ranks)
    assert finished.code == 0, finished.output
    assert_same_checkpoint(runs.folder / name / f"global_step{STEPS}", whole.checkpoint(STEPS))


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_run_goes_on_in_another_layout(layout: tuple[int, int, int], runs: LayoutRuns) -> None:
    whole = runs.trained(SPLIT)
    keys = Case("tokenformer", layout, tied=True).keys() | {"load": str(whole.checkpoint(HALF))}
    finished = runs.start(f"{layout}", layout, keys)
    assert finished.code == 0, finished.output
    assert "written in another layout" in finished.output
    runs.assert_continues(f"{layout}", whole)


@pytest.mark.full
def test_reshaping_there_and_back_is_bit_identical(runs: LayoutRuns) -> None:
    source = runs.trained(SPLIT).checkpoint(HALF)
    for name, origin, layout in (("there", source, (2, 2, 1)), ("back", runs.folder / "there", SPLIT.layout)):
        case = Case("tokenformer", layout, tied=True)
        config = runs.config(f"for-{name}", case.keys() | {"save": str(runs.folder / name)})
        folders = ["--input_dir", str(origin), "--config_file", str(config), "--output_dir", str(runs.folder / name)]
        assert reshape.main([*folders, "--ranks", str(math.prod(layout))]) == 0
    assert_same_checkpoint(runs.folder / "back" / source.name, source)
    keys = Case("tokenformer", (2, 2, 1), tied=True).keys() | {"load": str(runs.folder / "there")}
    finished = runs.start("reshaped", (2, 2, 1), keys)
    assert finished.code == 0, finished.output
    assert "another layout" not in finished.output
    runs.assert_continues("reshaped", runs.trained(SPLIT))


@pytest.mark.full
@pytest.mark.parametrize("layout", [(1, 1, 2), (2, 2, 1)], ids=str)
def test_bf16_curves_stay_in_their_band(layout: tuple[int, int, int], runs: LayoutRuns) -> None:
    """The band is that of AdamW's runs: three times the largest difference between fp32 and bf16 on one rank."""
    case = Case("tokenformer", layout, tied=True)
    exact, rounded, split = (
        torch.tensor(runs.trained(each, precision=precision).curve, dtype=torch.float64)
        for each, precision in ((case.alone, "fp32"), (case.alone, "bfloat16"), (case, "bfloat16"))
    )
    unit = (rounded - exact).abs().amax(0)
    assert unit[0] < 0.01 and unit[1] < 0.02
    assert ((split - exact).abs().amax(0) <= 3 * unit).all()


@pytest.mark.full
def test_a_run_that_grows_keeps_its_momentum(runs: LayoutRuns) -> None:
    grow = {"operator": "zero_key", "at_step": HALF, "ffn_slot_num": 96}
    keys = SPLIT.keys() | {"ffn_scale_base": 48, "extra_save_iters": [HALF], "grow": grow}
    finished = run_ranks(runs.config("grown", keys), ranks=SPLIT.ranks)
    assert finished.code == 0, finished.output
    before = runs.trained(SPLIT).checkpoint(HALF)
    small, large = (
        {name: state for layer in read_states(read_checkpoint(path)) for name, state in layer.by_global_name()}
        for path in (before, runs.folder / "grown" / f"global_step{HALF}")
    )
    grown = large["layers.0.mlp.key_tokens"].moments["momentum_buffer"]
    kept = small["layers.0.mlp.key_tokens"].moments["momentum_buffer"]
    assert torch.equal(grown[:48], kept) and not grown[48:].any() and grown.shape[0] == 96


@pytest.mark.full
def test_another_optimizers_checkpoint_is_refused_by_name(runs: LayoutRuns, tmp_path: Path) -> None:
    theirs = runs.trained(SPLIT).checkpoint(HALF)
    adam = LayoutRuns(tmp_path, Path(runs.data["data_path"]))
    refused = adam.start("refused", (1, 1, 1), SPLIT.alone.keys() | {"load": str(theirs)})
    assert refused.code == 1
    assert "was trained by Muon, whose moments Adam (optimizer.type) cannot go on with" in refused.output
    assert "`no_load_optim: true`" in refused.output
    fresh = adam.start("fresh", (1, 1, 1), SPLIT.alone.keys() | {
        "load": str(theirs), "no_load_optim": True, "override_lr_scheduler": True
    })  # fmt: skip
    assert fresh.code == 0, fresh.output
