"""Runs that go on in another layout, precision or padding of the vocabulary, with the optimizer's state."""

from __future__ import annotations

from collections.abc import Callable
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
from tests.helpers.configs import TOKENFORMER
from tests.helpers.covers import pairwise_cover
from tests.helpers.distributed import run_on_new_ranks
from tests.helpers.layout_runs import BASES, HALF, STEPS, Layout, Runs, assert_continues, curve
from tests.helpers.tensor_files import assert_same_checkpoint
from tools.ckpts import reshape

MOMENTS = ("exp_avg", "exp_avg_sq")
LAYOUTS: list[Layout] = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
"""(tensor, pipe, data) parallel sizes."""


@dataclass(frozen=True)
class Case:
    """A run that changes its layout after the first half."""

    before: Layout
    after: Layout
    model: str
    tied: bool

    def __str__(self) -> str:
        layouts = "-to-".join("tp{}-pp{}-dp{}".format(*layout) for layout in (self.before, self.after))
        return f"{self.model}-{'tied' if self.tied else 'untied'}-{layouts}"

    def choices(self) -> list[Any]:
        """Each size by itself: what is to meet in a cover."""
        return [*self.before, *self.after, self.model, self.tied]


ALL_CASES = [Case(*choices) for choices in product(LAYOUTS, LAYOUTS, BASES, [True, False]) if choices[0] != choices[1]]
COVER = pairwise_cover(ALL_CASES, Case.choices)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[] if case in COVER else pytest.mark.full) for case in ALL_CASES]
)
def test_a_run_goes_on_in_another_layout(case: Case, runs: Runs) -> None:
    keys = BASES[case.model] | {"no_weight_tying": not case.tied}
    name = f"{case.model}-{case.tied}"
    half = runs.half(case.before, keys, name)
    finished = runs.run(f"{case}", case.after, keys | {"load": str(half)})
    assert finished.code == 0, finished.output
    assert "written in another layout" in finished.output
    assert_continues(runs.folder / str(case), runs.whole(keys, name))


def test_without_the_moments_the_curve_is_another(runs: Runs) -> None:
    """The tolerance is tight enough to tell."""
    half = runs.half((2, 1, 1), TOKENFORMER, "tokenformer")
    finished = runs.run("without", (1, 1, 1), TOKENFORMER | {"load": str(half), "no_load_optim": True})
    assert finished.code == 0, finished.output
    with pytest.raises(AssertionError):
        assert_continues(runs.folder / "without", runs.whole(TOKENFORMER, "tokenformer"))


@pytest.mark.parametrize(("before", "after"), [("bfloat16", "fp32"), ("fp32", "bfloat16")])
def test_another_precision(before: str, after: str, runs: Runs, tmp_path: Path) -> None:
    """A converted checkpoint, and one that is rewritten by hand and loaded as DeepSpeed's own: the same."""
    layout = (1, 1, 2)
    half = runs.half((2, 1, 1), TOKENFORMER | {"precision": before}, before)
    keys = TOKENFORMER | {"precision": after}
    finished = runs.run(f"{before}-{after}", layout, keys | {"load": str(half)})
    assert finished.code == 0, finished.output
    config = runs.folder / f"{before}-{after}.yml"
    folders = ["--input_dir", str(half), "--config_file", str(config), "--output_dir", str(tmp_path)]
    assert reshape.main([*folders, "--ranks", "2"]) == 0
    by_hand = runs.run(f"{before}-{after}-by-hand", layout, keys | {"load": str(tmp_path)})
    assert by_hand.code == 0, by_hand.output
    assert "another layout" not in by_hand.output
    converted, rewritten = runs.folder / f"{before}-{after}", runs.folder / f"{before}-{after}-by-hand"
    losses = curve(converted, "train/lm_loss")
    assert losses == curve(rewritten, "train/lm_loss")
    assert list(losses) == list(range(HALF + 1, STEPS + 1))
    assert_same_checkpoint(converted / f"global_step{STEPS}", rewritten / f"global_step{STEPS}")


@pytest.mark.parametrize(
    ("model", "before", "after", "layout"),
    [
        pytest.param("tokenformer", 512, 640, (2, 1, 1), id="tokenformer-more"),
        pytest.param("pythia", 640, 512, (1, 1, 1), id="pythia-fewer"),
        pytest.param("tokenformer", 640, 512, (1, 1, 1), id="tokenformer-fewer", marks=pytest.mark.full),
        pytest.param("pythia", 512, 640, (2, 1, 1), id="pythia-more", marks=pytest.mark.full),
    ],
)
def test_masked_padding_of_the_vocabulary_may_change(
    model: str, before: int, after: int, layout: Layout, runs: Runs
) -> None:
    keys = BASES[model] | {"mask_padded_vocab": True, "padded_vocab_size": before}
    name = f"{model}-padded-{before}"
    half = runs.half(layout, keys, name)
    finished = runs.run(f"{name}-{after}", (1, 1, 1), keys | {"padded_vocab_size": after, "load": str(half)})
    assert finished.code == 0, finished.output
    assert_continues(runs.folder / f"{name}-{after}", runs.whole(keys, name))
    file = runs.folder / f"{name}-{after}" / f"global_step{STEPS}" / "layer_00-model_00-model_states.pt"
    assert torch.load(file, weights_only=True)["word_embeddings.weight"].shape[0] == after


def test_weights_alone_go_into_other_masked_padding(runs: Runs) -> None:
    keys = TOKENFORMER | {"mask_padded_vocab": True, "padded_vocab_size": 512}
    half = runs.half((2, 1, 1), keys, "tokenformer-padded-512")
    tuned = {"padded_vocab_size": 640, "load": str(half), "finetune": True}
    finished = runs.run("tuned", (1, 1, 1), keys | tuned)
    assert finished.code == 0, finished.output
    loss = curve(runs.folder / "tuned", "train/lm_loss")[1]
    assert loss < curve(runs.whole(keys, "tokenformer-padded-512"), "train/lm_loss")[HALF // 2]


def test_padding_that_counts_may_not_change(runs: Runs) -> None:
    half = runs.half((2, 1, 1), TOKENFORMER, "tokenformer")
    finished = runs.run("refused", (1, 1, 1), TOKENFORMER | {"padded_vocab_size": 640, "load": str(half)})
    assert finished.code == 1
    assert "512 tokens padded to 512, this run one of 512 padded to 640" in finished.output
    assert "With `mask_padded_vocab: true` from a run's start" in finished.output


def test_a_conversion_is_used_again(runs: Runs, copy: Callable[..., Path]) -> None:
    half = copy((2, 1, 1))
    first = runs.run("first", (1, 1, 1), TOKENFORMER | {"load": str(half)})
    second = runs.run("second", (1, 2, 1), TOKENFORMER | {"load": str(half), "precision": "bfloat16"})
    assert (first.code, second.code) == (0, 0), first.output + second.output
    assert "converting weights and optimizer state" in first.output
    assert "converting" not in second.output
    assert "its conversion to any layout is there already" in second.output
    assert sorted(path.name for path in half.glob("universal*")) == ["universal"]


def test_two_runs_that_convert_at_once_do_not_disturb_each_other(runs: Runs, copy: Callable[..., Path]) -> None:
    checkpoint = read_checkpoint(copy((2, 1, 1)))
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
    engine, _ = build_engine(loaded.run, batch, vocab, context, StopRequest())
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


@pytest.mark.parametrize("model", BASES)
def test_the_form_is_deepspeeds_own(model: str, runs: Runs) -> None:
    """DeepSpeed's loader, told nothing of our modules, finds the same in it."""
    keys = BASES[model] | {"no_weight_tying": True}
    half = runs.half((1, 1, 1), keys, f"{model}-False")
    if not (half / "universal").exists():
        assert runs.run(f"{model}-makes-it", (2, 1, 1), keys | {"load": str(half)}).code == 0
    config = runs.config(f"{model}-both", (2, 1, 1), keys | {"load": str(half)})
    run_on_new_ranks(loaded_by_both, 2, config)
