"""Runs that go on in another layout, precision or padding of the vocabulary, with the optimizer's state."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpointing.engine import universal
from megatron.checkpointing.store.checkpoint import read_checkpoint
from megatron.model.causal_lm import VocabSize
from megatron.mpu.context import ParallelContext
from megatron.training.build_engine import build_engine
from megatron.training.stop_request import StopRequest
from tests.helpers import layout_runs as trained
from tests.helpers.configs import layout_keys
from tests.helpers.covers import covered, pairwise_cover
from tests.helpers.distributed import run_on_new_ranks
from tests.helpers.layout_runs import (
    BASES,
    BF16_COVER,
    HALF,
    LAYOUTS,
    PAIRWISE,
    SPLIT,
    STEPS,
    Case,
    Layout,
    LayoutRuns,
)
from tests.helpers.records import records
from tests.helpers.tensor_files import assert_same_checkpoint
from tools.ckpts import reshape

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Move:
    """A run that changes its layout after the first half."""

    before: Layout
    after: Layout
    model: str
    tied: bool

    def __str__(self) -> str:
        layouts = "-to-".join("tp{}-pp{}-dp{}".format(*layout) for layout in (self.before, self.after))
        return f"{self.model}-{'tied' if self.tied else 'untied'}-{layouts}"

    @property
    def source(self) -> Case:
        """The run before, however it accumulates and recomputes."""
        return trained.case_with(self.before, self.model, self.tied)

    def choices(self) -> list[Any]:
        """Returns each size by itself: what is to meet in a cover."""
        return [*self.before, *self.after, self.model, self.tied]


ALL_MOVES = [Move(*choices) for choices in product(LAYOUTS, LAYOUTS, BASES, [True, False]) if choices[0] != choices[1]]
FEW = [Move(case.layout, (1, 1, 1), case.model, case.tied) for case in trained.FEW]
# Only from runs that are trained anyway, which leaves out no pair of choices.
COVER = [
    *pairwise_cover(
        [m for m in ALL_MOVES if m.model in PAIRWISE and m.source in {*trained.COVER, m.source.alone}], Move.choices
    ),
    *FEW,
]


@pytest.mark.parametrize("move", covered(ALL_MOVES, COVER))
def test_a_run_goes_on_in_another_layout(move: Move, layout_runs: LayoutRuns) -> None:
    source = layout_runs.trained(move.source)
    keys = move.source.model_keys() | {"load": str(source.checkpoint(HALF))}
    finished = layout_runs.start(str(move), move.after, keys)
    assert finished.code == 0, finished.output
    assert "written in another layout" in finished.output
    layout_runs.assert_continues(str(move), layout_runs.trained(move.source.alone))


def test_without_the_moments_the_curve_is_another(layout_runs: LayoutRuns) -> None:
    """The tolerance is tight enough to tell."""
    half = layout_runs.trained(SPLIT).checkpoint(HALF)
    finished = layout_runs.start("without", (1, 1, 1), SPLIT.model_keys() | {"load": str(half), "no_load_optim": True})
    assert finished.code == 0, finished.output
    with pytest.raises(AssertionError):
        layout_runs.assert_continues("without", layout_runs.trained(SPLIT.alone))


@pytest.mark.parametrize(
    ("source", "before", "after"),
    [(BF16_COVER[0], "bfloat16", "fp32"), (SPLIT, "fp32", "bfloat16")],
    ids=["bfloat16-fp32", "fp32-bfloat16"],
)
def test_another_precision(source: Case, before: str, after: str, layout_runs: LayoutRuns, tmp_path: Path) -> None:
    """A converted checkpoint, and one that is rewritten by hand and loaded as DeepSpeed's own: the same."""
    layout, name = (1, 1, 2), f"{before}-{after}"
    changes = {} if before == "fp32" else {"precision": before}
    half = layout_runs.trained(source, **changes).checkpoint(HALF)
    keys = source.model_keys() | {"precision": after}
    finished = layout_runs.start(name, layout, keys | {"load": str(half)})
    assert finished.code == 0, finished.output
    assert "written in another layout" in finished.output
    folders = ["--input_dir", str(half), "--config_file", str(layout_runs.folder / f"{name}.yml")]
    assert reshape.main([*folders, "--output_dir", str(tmp_path), "--ranks", "2"]) == 0
    by_hand = layout_runs.start(f"{name}-by-hand", layout, keys | {"load": str(tmp_path)})
    assert by_hand.code == 0, by_hand.output
    assert "another layout" not in by_hand.output
    assert layout_runs.curve_after_half(name) == layout_runs.curve_after_half(f"{name}-by-hand")
    converted, rewritten = (layout_runs.folder / run / f"global_step{STEPS}" for run in (name, f"{name}-by-hand"))
    assert_same_checkpoint(converted, rewritten)


def masked(padded: int) -> dict[str, Any]:
    return {"mask_padded_vocab": True, "padded_vocab_size": padded}


PADDINGS = [
    (Case("tokenformer", (2, 1, 1), tied=True), 512, 640),
    (Case("pythia", (1, 1, 1), tied=False), 640, 512),
    (Case("tokenformer", (1, 1, 1), tied=True), 640, 512),
    (Case("pythia", (2, 1, 1), tied=False), 512, 640),
]


@pytest.mark.parametrize(
    ("source", "before", "after"),
    covered(PADDINGS, PADDINGS[:2]),
    ids=["tokenformer-more", "pythia-fewer", "tokenformer-fewer", "pythia-more"],
)
def test_masked_padding_of_the_vocabulary_may_change(
    source: Case, before: int, after: int, layout_runs: LayoutRuns
) -> None:
    half = layout_runs.trained(source, **masked(before)).checkpoint(HALF)
    name = f"{source.model}-padded-{before}-{after}"
    finished = layout_runs.start(name, (1, 1, 1), source.model_keys() | masked(after) | {"load": str(half)})
    assert finished.code == 0, finished.output
    layout_runs.assert_continues(name, layout_runs.trained(source.alone, **masked(before)))
    file = layout_runs.folder / name / f"global_step{STEPS}" / "layer_00-model_00-model_states.pt"
    assert torch.load(file, weights_only=True)["word_embeddings.weight"].shape[0] == after


def test_weights_alone_go_into_other_masked_padding(layout_runs: LayoutRuns) -> None:
    source = Case("tokenformer", (2, 1, 1), tied=True)
    before = layout_runs.trained(source, **masked(512))
    tuned = masked(640) | {"load": str(before.checkpoint(HALF)), "finetune": True}
    finished = layout_runs.start("tuned", (1, 1, 1), source.model_keys() | tuned)
    assert finished.code == 0, finished.output
    assert records(layout_runs.folder / "tuned", "train/lm_loss")[1] < before.curve[HALF // 2 - 1][0]


def test_learned_positions_may_not_change(layout_runs: LayoutRuns) -> None:
    """Neither for a run that goes on nor for one that takes the weights alone."""
    case = FEW[0].source
    keys = case.model_keys() | {"load": str(layout_runs.trained(case).checkpoint(HALF)), "max_position_embeddings": 32}
    for name, more in {"more-positions": {}, "tuned-positions": {"finetune": True}}.items():
        finished = layout_runs.start(name, (1, 1, 1), keys | more)
        assert finished.code != 0
        assert "max_position_embeddings: checkpoint 16, configuration 32" in finished.output


def test_padding_that_counts_may_not_change(layout_runs: LayoutRuns) -> None:
    half = layout_runs.trained(SPLIT).checkpoint(HALF)
    keys = SPLIT.model_keys() | {"padded_vocab_size": 640, "load": str(half)}
    finished = layout_runs.start("refused", (1, 1, 1), keys)
    assert finished.code == 1
    assert "512 tokens padded to 512, this run one of 512 padded to 640" in finished.output
    assert "With `mask_padded_vocab: true` from a run's start" in finished.output


def test_a_conversion_is_used_again(layout_runs: LayoutRuns, half_copy: Path) -> None:
    keys = SPLIT.model_keys() | {"load": str(half_copy)}
    first = layout_runs.start("first", (1, 1, 1), keys)
    second = layout_runs.start("second", (1, 2, 1), keys | {"precision": "bfloat16"})
    assert (first.code, second.code) == (0, 0), first.output + second.output
    assert "converting weights and optimizer state" in first.output
    assert "converting" not in second.output
    assert "its conversion to any layout is there already" in second.output
    assert sorted(path.name for path in half_copy.glob("universal*")) == ["universal"]


def test_two_runs_that_convert_at_once_do_not_disturb_each_other(half_copy: Path) -> None:
    checkpoint = read_checkpoint(half_copy)
    slow, fast = universal.Conversion(checkpoint), universal.Conversion(checkpoint)
    slow.begin()
    fast.begin()
    for conversion in (fast, slow):
        for layout in conversion.reader.layouts:
            conversion.convert(layout)
        conversion.publish()
    assert [path.name for path in checkpoint.path.glob("universal*")] == ["universal"]
    made = (checkpoint.path / "universal").stat().st_ino
    universal.universal_form(checkpoint, "full")
    assert (checkpoint.path / "universal").stat().st_ino == made, "it is whole, and used as it is"


def loaded_by_both(config: Path) -> None:
    """This rank's partitions after our loader and after DeepSpeed's own."""
    import deepspeed

    from megatron.checkpointing.engine import load_universal
    from megatron.checkpointing.store.safe_load import load_tensors
    from megatron.config.load_config import load_config

    deepspeed.init_distributed("gloo", verbose=False)
    loaded = load_config([config])
    sizes = loaded.run.parallel
    context = ParallelContext.create(sizes.model_parallel_size, sizes.pipe_parallel_size)
    batch, vocab = loaded.batch(context.tensor_size), VocabSize(512, 512)
    engine = build_engine(loaded.run, batch, vocab, context, StopRequest()).engine
    folder = Path(loaded.run.checkpoint.load or "") / "universal"
    section = loaded.run.training.optimizer
    load_universal.load_universal(engine, folder, context, section, vocab_size=512, same_precision=True)
    adam = engine.optimizer.optimizer
    flats = [group["params"][0] for group in adam.param_groups]
    ours = [[flat.detach().clone(), *(adam.state[flat][key].clone() for key in MOMENTS)] for flat in flats]
    weights = [weight.detach().clone() for weight in engine.module.parameters()]
    for flat in flats:
        flat.data.zero_()
        del adam.state[flat]
    engine._config.load_universal_checkpoint = True
    engine.load_checkpoint(str(folder.parent), tag="universal")
    theirs = [[flat.detach(), *(adam.state[flat][key] for key in MOMENTS)] for flat in flats]
    for group, expected in zip(ours, theirs, strict=True):
        for ours_, theirs_ in zip(group, expected, strict=True):
            assert ours_.numel() > 0 and torch.equal(ours_, theirs_)
    assert all(map(torch.equal, weights, engine.module.parameters()))
    assert load_tensors(folder / "mp_rank_00_model_states.pt")["global_steps"] == engine.global_steps == HALF


@pytest.mark.parametrize("model", covered(list(BASES), PAIRWISE))
def test_the_form_is_deepspeeds_own(model: str, layout_runs: LayoutRuns) -> None:
    """DeepSpeed's loader, told nothing of our modules, finds the same in it."""
    case = Case(model, (1, 1, 1), tied=False)
    half = layout_runs.trained(case).checkpoint(HALF)
    universal.universal_form(read_checkpoint(half), "full")
    keys = case.model_keys() | layout_keys(tensor=2) | {"load": str(half)}
    run_on_new_ranks(loaded_by_both, 2, layout_runs.config(f"{model}-both", keys))
