"""One run that grows as it trains is the same as a small run, the tool that grows its checkpoint, and a large run."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import yaml

from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.store.checkpoint import read_checkpoint
from megatron.config.load_config import load_config
from megatron.config.model_size import training_flops
from megatron.errors import CheckpointError
from megatron.loaded_model.loaded_model import load_model
from megatron.mpu.context import ParallelContext
from megatron.training import pretrain
from megatron.training.build_engine import BuiltEngine
from megatron.training.run_start import find_start
from megatron.training.stop_request import StopRequest
from tests.helpers.configs import PYTHIA, TINY, TOKENFORMER, layout_keys
from tests.helpers.records import records
from tests.helpers.runs import run_ranks, train
from tests.helpers.tensor_files import assert_same_checkpoint
from tools.ckpts import grow

GROWN, STEPS, BATCH = 4, 8, 8
SIZES = {"qkv_slot_num": 32, "ffn_slot_num": 96}
RULES = {"operator": "zero_key", "learning_rate": "rewarm_new", "rewarm_iters": 3}
FAST = {"type": "Adam", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8}}
PINNED = {"qkv_scale_base": 24, "proj_scale_base": 40, "ffn_scale_base": 48}
NEOX = {key: value for key, value in PYTHIA.items() if TINY.get(key) != value}
NEOX |= dict.fromkeys(key for key in TOKENFORMER if key not in PYTHIA)
"""Changes that make Pythia of TokenFormer: a key that is null is as if it were not there."""
TOLERANCE = 1e-5
"""Of losses and norms between layouts (tests/helpers/layout_runs.py)."""


class Runs:
    """Runs of one dataset; each configuration and its run's folder have the same name."""

    def __init__(self, folder: Path, dataset: Path) -> None:
        self.folder = folder
        self.data = {"data_path": str(dataset), "index_cache_dir": str(folder / "index")}

    def config(self, name: str, layout: tuple[int, int, int] = (1, 1, 1), **keys: Any) -> Path:
        path = self.folder / f"{name}.yml"
        settings = TOKENFORMER | layout_keys(*layout, batch=BATCH) | {"train_iters": STEPS} | self.data
        path.write_text(yaml.safe_dump(settings | {"save": str(self.folder / name)} | keys))
        return path

    def train(self, name: str, layout: tuple[int, int, int] = (1, 1, 1), **keys: Any) -> Path:
        train(self.config(name, layout, **keys), ranks=math.prod(layout))
        return self.folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("growing"), dataset)


@pytest.fixture(scope="module")
def grown(runs: Runs) -> Path:
    """A run that grows as it trains."""
    return runs.train("grown", grow=RULES | SIZES | {"at_step": GROWN})


@pytest.fixture(scope="module")
def small(runs: Runs) -> Path:
    """The same up to its growth."""
    assert run_ranks(runs.config("small"), f"exit_interval={GROWN}").code == 75
    return runs.folder / "small"


@pytest.mark.parametrize("how", ["load", pytest.param("tool", marks=pytest.mark.full)])
def test_it_ends_like_three_runs(how: str, runs: Runs, grown: Path, small: Path) -> None:
    if how == "load":
        by_hand = runs.train(how, load=str(small), grow=RULES, **SIZES, **PINNED)
    else:
        config = runs.config(how, **SIZES, **PINNED)
        words = ["--input_dir", str(small), "--output_dir", str(runs.folder / how), "--config_file", str(config)]
        assert (
            grow.main([*words, "--operator", "zero_key", "--learning_rate", "rewarm_new", "--rewarm_iters", "3"]) == 0
        )
        by_hand = runs.train(how, **SIZES, **PINNED, auto_resume=True)
    assert_same_checkpoint(by_hand / f"global_step{STEPS}", grown / f"global_step{STEPS}")
    for key in ("train/lm_loss", "train/grad_norm", "train/learning_rate", "training_flops"):
        theirs = records(grown, key)
        ours = {step: value for step, value in records(by_hand, key).items() if step > GROWN}
        assert ours == {step: theirs[step] for step in range(GROWN + 1, STEPS + 1)}, key
    one, other = (read_checkpoint(run / f"global_step{STEPS}").state for run in (by_hand, grown))
    assert one.growth == other.growth
    assert one.training_flops == other.training_flops


def test_training_flops_are_those_of_both_sizes(runs: Runs, grown: Path) -> None:
    """By the formula of each model, and without a jump in the records."""
    before = load_config([runs.config("grown")]).run.model
    after = read_checkpoint(grown / f"global_step{STEPS}").config.model
    tokens, vocabulary = BATCH * before.seq_length, 512
    each = [training_flops(model, vocabulary, model.seq_length) * tokens for model in (before, after)]
    expected = {step: each[0] * min(step, GROWN) + each[1] * max(step - GROWN, 0) for step in range(1, STEPS + 1)}
    assert records(grown, "training_flops") == expected
    assert each[1] > 1.1 * each[0]


def test_records_mark_the_growth_and_the_small_model_is_kept(runs: Runs, grown: Path, small: Path) -> None:
    rows = [json.loads(line) for line in (grown / "metrics.jsonl").read_text().splitlines()]
    (event,) = [row for row in rows if "event" in row]
    assert rows.index(event) == GROWN, "between the rows of two steps"
    sizes = [512 * 32 + 2 * 2 * 32 * tokens + 2 * 32 for tokens in (3 * 24 + 40 + 48, 3 * 32 + 40 + 96)]
    assert event | {
        "iteration": GROWN, "event": "growth", "operator": "zero_key", "consumed_tokens": GROWN * BATCH * 16,
        "before": {"qkv": 24, "proj": 40, "ffn": 48, "num_layers": 2},
        "after": {"qkv": 32, "proj": 40, "ffn": 96, "num_layers": 2},
        "parameters_before": sizes[0], "parameters_after": sizes[1],
    } == event  # fmt: skip
    assert json.loads((grown / "run.json").read_text())["parameters"] == sizes[1]
    kept = grown / "before_growth" / f"global_step{GROWN}"
    assert_same_checkpoint(kept, small / f"global_step{GROWN}")
    assert read_checkpoint(kept).state.growth == ()


def test_its_configuration_reads_the_larger_model(runs: Runs, grown: Path) -> None:
    """For evaluation, generation and export it goes on describing the small one."""
    config = load_config([runs.config("grown", grow=RULES | SIZES | {"at_step": GROWN})]).run
    for step, tokens in ((GROWN, 96), (STEPS, 96)):
        checkpoint = read_checkpoint(grown / f"global_step{step}")
        model = load_model(config, checkpoint, ParallelContext.single(), torch.device("cpu"))
        assert model.config.param_tokens is not None
        assert model.config.param_tokens.ffn == tokens
        assert model.config.param_tokens.ffn_scale_base == 48


def test_a_smaller_checkpoint_does_not_grow_unasked(runs: Runs, small: Path) -> None:
    """A wrong number in the YAML is an error, which names the key that would make it none."""
    config = load_config([runs.config("typo", load=str(small), ffn_slot_num=480)]).run
    with pytest.raises(CheckpointError, match=r"another model.*`grow\.operator` says how to grow it"):
        find_start(config)


def test_a_growth_does_not_happen_twice(runs: Runs, grown: Path) -> None:
    """A configuration that was changed to describe the larger model does not make it larger still."""
    growth = RULES | {"at_step": GROWN, "factor": 2}
    config = load_config([runs.config("twice", grow=growth, load=str(grown), **SIZES, **PINNED)]).run
    with pytest.raises(CheckpointError, match=rf"has grown after step {GROWN} already"):
        find_start(config)


@pytest.mark.parametrize("layout", [(1, 1, 1), pytest.param((2, 2, 1), marks=pytest.mark.full)])
def test_partial_init_is_the_published_rule(layout: tuple[int, int, int], runs: Runs, small: Path) -> None:
    """The checkpoint's tokens come first, the others as a fresh run starts with them; all else begins anew."""
    name = f"partial{math.prod(layout)}"
    run = runs.train(name, layout, pretrain_partial_init=str(small), extra_save_iters=[0], train_iters=2, **SIZES)
    fresh = runs.train(f"fresh{math.prod(layout)}", layout, extra_save_iters=[0], train_iters=1, **SIZES)
    theirs = read_weights(read_checkpoint(small / f"global_step{GROWN}"))
    start, drawn = (read_weights(read_checkpoint(each / "global_step0")) for each in (run, fresh))
    for weight_name, weight in start.items():
        rows = len(theirs[weight_name])
        assert torch.equal(weight[:rows], theirs[weight_name]), weight_name
        assert torch.equal(weight[rows:], drawn[weight_name][rows:]), weight_name
    assert len(start["layers.0.mlp.key_tokens"]) == 96
    state = read_checkpoint(run / "global_step2").state
    assert (state.iteration, state.schedule_steps, state.consumed_train_samples) == (2, 2, 2 * BATCH)
    tokens = read_checkpoint(run / "global_step2").config.model.param_tokens
    assert tokens is not None and tokens.ffn_scale_base == 96, "the release scales by the count of the moment"
    spent = read_checkpoint(small / f"global_step{GROWN}").state.training_flops
    assert state.training_flops > spent, "the small model's training counts"
    assert [record.rules.operator for record in state.growth] == ["published"]


@pytest.mark.full
def test_what_reads_a_checkpoint_in_mid_ramp_computes_what_training_evaluates(runs: Runs) -> None:
    """The multiplier is then in the keys; without it, the loss is another."""
    keys: dict[str, Any] = {"grow": SIZES | {"operator": "mask_ramp", "at_step": GROWN, "ramp_iters": 10}}
    path = runs.config("opening", **keys, eval_iters=1, eval_interval=STEPS, optimizer=FAST)
    train(path)
    loaded = load_config([path], ["auto_resume=true"])
    start = find_start(loaded.run)
    parts = {"build_engine": lambda *_: BuiltEngine(*[cast(Any, None)] * 4), "describe_run": lambda *_: {}}
    with mock.patch.multiple(pretrain, **parts):
        run = pretrain.assemble(
            loaded.run, loaded.batch(1), ParallelContext.single(), path.parent, start, StopRequest()
        )  # fmt: skip
    inputs, (labels, _) = next(run.data.read("test", 0))
    assert start.checkpoint is not None
    model = load_model(loaded.run, start.checkpoint, ParallelContext.single(), torch.device("cpu"))
    loss = float(F.cross_entropy(model.logits(inputs).double().flatten(0, 1), labels.flatten()))
    assert records(runs.folder / "opening", "test/lm_loss")[STEPS] == pytest.approx(loss, abs=1e-6)
    multiplier = start.checkpoint.state.growth[-1].score_multiplier(STEPS)
    assert multiplier == 0.4
    for layer in model.module.layers:
        with torch.no_grad():
            layer.mlp.key_tokens[48:] /= multiplier
    without = float(F.cross_entropy(model.logits(inputs).double().flatten(0, 1), labels.flatten()))
    assert abs(without - loss) > 1e-4


@pytest.mark.full
def test_the_small_engine_is_gone_before_the_large_one_is_built(runs: Runs) -> None:
    """Or a run would need memory for both."""
    path = runs.config("memory", grow=RULES | SIZES | {"at_step": GROWN})
    finished = run_ranks(path, before=require_one_engine)
    assert finished.code == 0, finished.output
    assert finished.output.count("engines before this one: ") == 2
    assert "engines before this one: [True" not in finished.output


def require_one_engine() -> None:
    built: list[weakref.ref[Any]] = []
    original = pretrain.build_engine

    def build(*arguments: Any) -> BuiltEngine:
        print("engines before this one:", [each() is not None for each in built])
        found = original(*arguments)
        built.extend(weakref.ref(part) for part in (found.engine, found.engine.module, found.engine.optimizer))
        return found

    pretrain.build_engine = build


@pytest.mark.full
def test_a_run_is_interrupted_while_the_rules_hold(runs: Runs) -> None:
    """While scores open and rows warm up, it goes on from a checkpoint bit by bit."""
    growth = SIZES | {"operator": "mask_ramp", "at_step": 2, "ramp_iters": 5, "old_rows_lr": 0, "old_rows_iters": 4}
    growth |= {"learning_rate": "rewarm_all", "rewarm_iters": 6, "new_rows_weight_decay": 0.3}
    keys: dict[str, Any] = {"grow": growth, "eval_iters": 1, "eval_interval": 2}
    whole = runs.train("whole", (1, 1, 2), **keys)
    parts = runs.config("parts", (1, 1, 2), **keys, auto_resume=True)
    assert run_ranks(parts, "exit_interval=5", ranks=2).code == 75
    train(parts, ranks=2)
    assert_same_checkpoint(runs.folder / "parts" / f"global_step{STEPS}", whole / f"global_step{STEPS}")
    for key in ("train/lm_loss", "valid/lm_loss", "train/learning_rate", "training_flops"):
        assert records(runs.folder / "parts", key) == records(whole, key), key


@pytest.mark.full
def test_a_layout_of_four_ranks_grows_like_one_rank(runs: Runs, grown: Path) -> None:
    spread = runs.train("spread", (2, 2, 1), grow=RULES | SIZES | {"at_step": GROWN})
    for key in ("train/lm_loss", "train/grad_norm"):
        assert records(spread, key) == pytest.approx(records(grown, key), abs=TOLERANCE, rel=0)


@pytest.mark.full
@pytest.mark.parametrize("operator", ["stack", "insert"])
def test_a_run_of_two_stages_grows_by_layers_like_one_rank(operator: str, runs: Runs) -> None:
    growth = {"operator": operator, "at_step": GROWN, "num_layers": 4, "learning_rate": "rewarm_new", "rewarm_iters": 2}
    one, two = (
        runs.train(f"{operator}{pipe}", (1, pipe, 1), grow=growth, **NEOX) for pipe in (1, 2)
    )  # fmt: skip
    for key in ("train/lm_loss", "train/grad_norm"):
        assert records(two, key) == pytest.approx(records(one, key), abs=TOLERANCE, rel=0)
    assert read_checkpoint(two / f"global_step{STEPS}").config.model.num_layers == 4


@pytest.mark.full
def test_growth_after_tokens_with_data_from_its_start(runs: Runs) -> None:
    """The growth comes with the step that reads the last of the tokens; consumed tokens go on, samples start again."""
    tokens = (GROWN - 1) * BATCH * 16 + 1
    run = runs.train(
        "tokens", grow=RULES | SIZES | {"at_tokens": tokens, "data": "restart"}, log_batch_hashes=True, eval_iters=1
    )
    assert records(run, "consumed_tokens") == {step: step * BATCH * 16 for step in range(1, STEPS + 1)}
    hashes = [json.loads(line)["sha256"] for line in (run / "batch_hashes.jsonl").read_text().splitlines()]
    assert hashes[GROWN:] == hashes[:GROWN]
    assert len(set(hashes)) == GROWN
