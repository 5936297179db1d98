"""Runs that go on in another layout, precision or padding of the vocabulary, with the optimizer's state."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron.checkpointing.engine import universal
from megatron.checkpointing.store.checkpoint import read_checkpoint
from megatron.model.causal_lm import VocabSize
from megatron.mpu.context import ParallelContext
from megatron.training.build_engine import build_engine
from megatron.training.stop_request import StopRequest
from tests.helpers.configs import PYTHIA, TOKENFORMER, layout_keys, write_dataset
from tests.helpers.covers import pairs, pairwise_cover
from tests.helpers.distributed import run_on_new_ranks
from tests.helpers.faults import kill_all_ranks
from tests.helpers.runs import Finished, run_ranks
from tests.helpers.tensor_files import assert_same_checkpoint
from tools.ckpts import reshape

HALF, STEPS = 10, 20
TOLERANCE = 1e-5
MOMENTS = ("exp_avg", "exp_avg_sq")
BASES = {"tokenformer": TOKENFORMER, "pythia": PYTHIA}
Layout = tuple[int, int, int]
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


class Runs:
    """Runs in a folder; each half and each whole run is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = {"data_path": str(write_dataset(folder / "text")), "index_cache_dir": str(folder / "index")}

    def config(self, name: str, layout: Layout, keys: dict[str, Any]) -> Path:
        """A configuration whose checkpoints and records go to the folder `name`."""
        config = self.folder / f"{name}.yml"
        settings = self.data | {"save": str(self.folder / name), "train_iters": STEPS, "gradient_clipping": 0.5}
        config.write_text(yaml.safe_dump(keys | layout_keys(*layout) | settings))
        return config

    def run(self, name: str, layout: Layout, keys: dict[str, Any], **more: Any) -> Finished:
        """Train in `layout` with the checkpoints and records in the folder `name`."""
        return run_ranks(self.config(name, layout, keys), ranks=math.prod(layout), **more)

    def half(self, layout: Layout, keys: dict[str, Any], name: str) -> Path:
        """The checkpoint after the first half."""
        folder = self.folder / f"half-{name}-{layout}"
        if not folder.exists():
            finished = self.run(folder.name, layout, keys | {"exit_interval": HALF})
            assert finished.code == 75, finished.output
        return folder / f"global_step{HALF}"

    def whole(self, keys: dict[str, Any], name: str) -> Path:
        """The uninterrupted run on one rank."""
        folder = self.folder / f"whole-{name}"
        if not folder.exists():
            finished = self.run(folder.name, (1, 1, 1), keys)
            assert finished.code == 0, finished.output
        return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def copy(runs: Runs, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of the first half that the test may change, without a conversion."""

    def make(layout: Layout, keys: dict[str, Any] = TOKENFORMER, name: str = "tokenformer") -> Path:
        source = runs.half(layout, keys, name)
        shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("universal*"))
        return tmp_path / source.name

    return make


def curve(run: Path, key: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["iteration"]: row[key] for row in rows}


def assert_continues(run: Path, whole: Path, tolerance: float = TOLERANCE) -> None:
    for key in ("train/lm_loss", "train/grad_norm", "train/learning_rate", "consumed_tokens", "train/skipped_steps"):
        ours, theirs = curve(run, key), curve(whole, key)
        assert list(ours) == list(range(HALF + 1, STEPS + 1))
        assert ours == pytest.approx({step: theirs[step] for step in ours}, abs=tolerance, rel=0), key


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


def test_the_cover_has_every_pair_of_choices() -> None:
    made = set().union(*(pairs(case.choices()) for case in COVER))
    assert made == set().union(*(pairs(case.choices()) for case in ALL_CASES))
    assert len(ALL_CASES) == 168
    assert len(COVER) <= 14


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


def damage(half: Path, kind: str) -> None:
    folder = half / "universal"
    moments = next(folder.glob("zero/*/exp_avg.pt"))
    match kind:
        case "a byte":
            content = bytearray(moments.read_bytes())
            content[len(content) // 2] ^= 1
            moments.write_bytes(content)
        case "a file less":
            moments.unlink()
        case "no list":
            (folder / "conversion.json").unlink()
        case "half a list":
            (folder / "conversion.json").write_text((folder / "conversion.json").read_text()[:100])
        case "of something else":
            text = (folder / "conversion.json").read_text()
            source = json.loads(text)["source"]
            (folder / "conversion.json").write_text(text.replace(source, "0" * 64))


@pytest.mark.parametrize(
    "kind",
    [
        "a byte",
        "of something else",
        *(pytest.param(kind, marks=pytest.mark.full) for kind in ("a file less", "no list", "half a list")),
    ],
)
def test_a_damaged_conversion_is_made_again(kind: str, runs: Runs, tmp_path: Path) -> None:
    whole = runs.half((2, 1, 1), TOKENFORMER, "tokenformer")
    if not (whole / "universal").exists():
        assert runs.run("makes-it", (1, 1, 1), TOKENFORMER | {"load": str(whole)}).code == 0
    half = tmp_path / whole.name
    shutil.copytree(whole, half)
    damage(half, kind)
    finished = runs.run(f"damaged-{kind}", (1, 1, 1), TOKENFORMER | {"load": str(half)})
    assert finished.code == 0, finished.output
    assert "It is made again." in finished.output
    assert_continues(runs.folder / f"damaged-{kind}", runs.whole(TOKENFORMER, "tokenformer"))


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


def kill_at_layer(number: int) -> None:
    original = universal.Conversion.convert

    def convert(self: Any, layout: Any) -> None:
        if self.done == number:
            kill_all_ranks()
        original(self, layout)

    universal.Conversion.convert = convert  # type: ignore[method-assign]


def test_a_killed_conversion_is_made_again(runs: Runs, copy: Callable[..., Path]) -> None:
    half = copy((2, 1, 1))
    keys = TOKENFORMER | {"load": str(half)}
    killed = runs.run("killed", (1, 1, 2), keys, before=kill_at_layer, arguments=(2,))
    assert killed.codes == [-signal.SIGKILL] * 2
    (left,) = half.glob("universal*")
    assert left.name.startswith("universal.writing-")
    assert runs.run("after-kill", (1, 1, 2), keys).code == 0
    assert_continues(runs.folder / "after-kill", runs.whole(TOKENFORMER, "tokenformer"))
    assert sorted(half.glob("universal*")) == [half / "universal", left]
    for path in (left, *left.rglob("*")):
        os.utime(path, (0, 0))
    shutil.rmtree(half / "universal")
    assert runs.run("later", (1, 1, 2), keys).code == 0
    assert list(half.glob("universal*")) == [half / "universal"], "what was abandoned is gone"


def no_room() -> None:
    """Files can grow to a few kilobytes from the moment that the conversion begins."""
    original = universal.Conversion.begin

    def begin(self: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        original(self)

    universal.Conversion.begin = begin  # type: ignore[method-assign]


def test_no_room_for_a_conversion_is_told_on_all_ranks(runs: Runs, copy: Callable[..., Path]) -> None:
    half = copy((2, 1, 1))
    finished = runs.run("no-room", (1, 1, 2), TOKENFORMER | {"load": str(half)}, before=no_room)
    assert finished.codes == [1, 1], finished.output
    assert finished.output.count("make room there") == 2
    assert not list(half.glob("universal*"))


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
    load_universal.load_universal(engine, folder, context, moments=MOMENTS, vocab_size=512, same_precision=True)
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
