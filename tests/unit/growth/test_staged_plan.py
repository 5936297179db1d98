"""Plans of staged runs: what they say, what follows from it, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.checkpointing.store import find_checkpoint
from megatron.config.load_config import load_config
from megatron.errors import CheckpointError, ConfigError
from megatron.growth.staged_plan import Stage, load_plan
from tests.helpers.configs import TOKENFORMER
from tests.helpers.forkserver import ROOT
from tools import run_stages

PLANS = ROOT / "configs" / "growth"
SMALL: dict[str, Any] = (
    TOKENFORMER
    | {"padded_vocab_size": 512, "train_batch_size": 8, "lr_decay_iters": None}
    | {
        "train_micro_batch_size_per_gpu": None,
        "gradient_accumulation_steps": None,
    }
)
GROW = {"grow": {"operator": "zero_key"}}
LARGE = {"qkv_slot_num": 48, "ffn_slot_num": 96, "qkv_scale_base": 24, "ffn_scale_base": 48} | GROW
TOKENS_PER_STEP = 8 * 16

# Appendix D and table 9 of the paper; the README of its release.
PUBLISHED: dict[str, dict[str, int]] = {
    "progressive_15B": {"124M": 123_569_664, "354M": 354_190_848, "757M": 753_796_608, "1.4B": 1_309_705_728},
    "released_60k": {"354M": 353_503_232, "757M": 756_156_416},
}
PUBLISHED |= {
    "progressive_30B": PUBLISHED["progressive_15B"],
    "progressive_60B": PUBLISHED["progressive_15B"],
    "released_120k": PUBLISHED["released_60k"],
    "wsd": {"small": 189_629_952, "large": 340_624_896},
}


def write_plan(folder: Path, stages: dict[str, Any], base: dict[str, Any] = SMALL, **keys: Any) -> Path:
    (folder / "base.yml").write_text(yaml.safe_dump(base, sort_keys=False))
    plan = folder / "plan.yml"
    content = {"config_files": ["base.yml"], "folder": str(folder / "runs"), "stages": stages} | keys
    plan.write_text(yaml.safe_dump(content, sort_keys=False))
    return plan


def line_of(file: Path, text: str) -> int:
    (line,) = [number for number, line in enumerate(file.read_text().splitlines(), 1) if text in line]
    return line


def parameters(stage: Stage) -> int:
    """Table 3 of the paper, with the embedding and the final norm's weight and bias."""
    sizes, hidden = stage.sizes, stage.loaded.run.model.hidden_size
    assert sizes.qkv and sizes.proj and sizes.ffn
    return 2 * sizes.num_layers * hidden * (3 * sizes.qkv + sizes.proj + sizes.ffn) + 50304 * hidden + 2 * hidden


def test_every_shipped_plan_is_listed() -> None:
    shipped = {file.stem for file in PLANS.glob("*.yml") if "stages:" in file.read_text()}
    assert shipped == set(PUBLISHED)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameters_of_the_shipped_plans(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    stages = load_plan(PLANS / f"{name}.yml").stages
    assert {stage.name: parameters(stage) for stage in stages} == PUBLISHED[name]
    assert run_stages.main([str(PLANS / f"{name}.yml"), "--check"]) == 0
    shown = capsys.readouterr().out
    for stage, count in PUBLISHED[name].items():
        (row,) = [line for line in shown.splitlines() if line.startswith(f"{stage} ")]
        assert f" {count:,} " in row


def test_sizes_and_budgets_of_the_papers_chain() -> None:
    for billions in (15, 30, 60):
        stages = load_plan(PLANS / f"progressive_{billions}B.yml").stages
        tokens = [(stage.sizes.qkv, stage.sizes.proj, stage.sizes.ffn) for stage in stages]
        assert tokens == [(n, n, 4 * n) for n in (576, 2140, 4850, 8620)]
        for stage, budget in zip(stages, [300, billions, billions, billions], strict=True):
            model, training = stage.loaded.run.model, stage.loaded.run.training
            assert (model.num_layers, model.hidden_size, model.seq_length) == (12, 768, 1024)
            assert stage.tokens_per_step == 512 * 1024
            assert 0 <= stage.tokens - budget * 10**9 < stage.tokens_per_step
            assert stage.first_step == 0, "every stage has a schedule of its own"
            assert training.lr_schedule.warmup * stage.last_step == pytest.approx(2000, abs=1)
            assert training.lr_schedule.min_lr == 0.0


def test_sizes_and_budgets_of_the_released_growth() -> None:
    for thousands in (60, 120):
        small, large = load_plan(PLANS / f"released_{thousands}k.yml").stages
        assert (small.sizes.qkv, small.sizes.proj, small.sizes.ffn) == (768, 768, 3072)
        assert (large.sizes.qkv, large.sizes.proj, large.sizes.ffn) == (1792, 1792, 7168)
        assert (large.loaded.run.model.num_layers, large.loaded.run.model.hidden_size) == (24, 1024)
        assert (small.last_step, large.last_step) == (600_000, thousands * 1000)


def test_the_published_sizes_allow_two_tensor_parallel_ranks_and_no_more() -> None:
    plan = PLANS / "progressive_30B.yml"
    assert len(load_plan(plan, ["model_parallel_size=2"]).stages) == 4
    with pytest.raises(ConfigError) as caught:
        load_plan(plan, ["model_parallel_size=4"])
    message = str(caught.value)
    assert f"stage 757M ({plan}:{line_of(plan, '757M:')})" in message
    assert f"{plan}:{line_of(plan, 'qkv_slot_num: 4850')} qkv_slot_num: 4850" in message
    assert "does not split over model_parallel_size 4" in message


def test_the_batch_of_every_stage_fits_the_ranks(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, {"a": {"steps": 4}, "b": {"steps": 4, "keys": {"train_batch_size": 12}}})
    assert [stage.tokens_per_step for stage in load_plan(plan, ranks=1).stages] == [8 * 16, 12 * 16]
    assert run_stages.main([str(plan), "--check"]) == 0
    with pytest.raises(ConfigError, match=r"stage a \(.*plan.yml:[0-9]+\).*3 data-parallel ranks"):
        run_stages.main([str(plan), "--check", "--world-size", "3"])
    with pytest.raises(ConfigError, match=r"stage b \(.*2 data-parallel ranks"):
        load_plan(plan, ["num_gpus=2", "train_micro_batch_size_per_gpu=4", "gradient_accumulation_steps=1"])


def test_a_stage_that_goes_on_shares_steps_schedule_and_data(tmp_path: Path) -> None:
    plan = write_plan(
        tmp_path,
        {
            "a": {"steps": 4},
            "b": {"tokens": 3 * TOKENS_PER_STEP - 1, "keys": LARGE},
            "c": {"steps": 5, "restart": True, "keys": {"optimizer": {"params": {"lr": 2e-3}}}},
        },
    )
    a, b, c = load_plan(plan).stages
    assert [(stage.first_step, stage.last_step) for stage in (a, b, c)] == [(0, 4), (4, 7), (0, 5)]
    assert [stage.loaded.run.training.train_iters for stage in (a, b, c)] == [7, 7, 5]
    assert [stage.loaded.run.training.exit_interval for stage in (a, b, c)] == [4, None, None]
    assert [stage.loaded.run.checkpoint.load for stage in (a, b, c)] == [None, str(a.folder), str(b.folder)]
    assert [stage.loaded.run.checkpoint.finetune for stage in (a, b, c)] == [False, False, True]
    assert [stage.loaded.run.training.optimizer.lr for stage in (a, b, c)] == [1e-3, 1e-3, 2e-3]
    assert c.sizes == b.sizes, "keys that a stage does not name stay as they were"
    assert b.tokens == 3 * TOKENS_PER_STEP, "steps are whole"


def test_the_file_that_a_stage_trains_with_says_what_the_plan_says(tmp_path: Path) -> None:
    stage = load_plan(write_plan(tmp_path, {"a": {"steps": 4}, "b": {"steps": 4, "keys": LARGE}})).stages[1]
    written = tmp_path / "stage.yml"
    written.write_text(yaml.safe_dump(dict(stage.keys), sort_keys=False))
    assert load_config([written]).run == stage.loaded.run


def test_keys_on_the_command_line_hold_for_every_stage(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, {"a": {"steps": 4}, "b": {"steps": 4, "keys": {"num_workers": 3}}})
    stages = load_plan(plan, ["num_workers=2", "optimizer.params.lr=5e-4"], folder=tmp_path / "elsewhere").stages
    assert [stage.loaded.run.data.num_workers for stage in stages] == [2, 2]
    assert [stage.loaded.run.training.optimizer.lr for stage in stages] == [5e-4, 5e-4]
    assert [stage.folder for stage in stages] == [tmp_path / "elsewhere" / name for name in "ab"]


@pytest.mark.parametrize(
    ("keys", "at", "message"),
    [
        ({"hidden_size": 64}, "hidden_size: 64", "stage b cannot follow a, where it is 32: growth adds"),
        ({"num_attention_heads": 2}, "num_attention_heads: 2", "cannot follow a, where it is 4"),
        ({"ffn_slot_num": 40}, "ffn_slot_num: 40", "cannot follow a, which has 48: growth adds. Use 48 or more"),
        ({"num_layers": 1}, "num_layers: 1", "cannot follow a, which has 2"),
        ({"padded_vocab_size": 1024}, "padded_vocab_size: 1024", "an embedding belongs to its vocabulary"),
        ({"tokenizer_type": "HFTokenizer"}, "tokenizer_type: HFTokenizer", "belongs to its vocabulary"),
        ({"norm_activation_type": "softmax"}, "norm_activation_type: softmax", "where it is l2_norm_gelu"),
        ({"optimizer": {"params": {"lr": 0.01}}}, "lr: 0.01", "`override_lr_scheduler: true`"),
        ({"data_path": "other"}, "data_path: other", "`allow_changed_data: true`, or `restart: true`"),
        ({"ffn_slot_num": 96}, "b:", "say how to grow"),
        ({"ffn_slot_num": 96} | GROW, "b:", "Set `ffn_scale_base: 48`"),
        ({"grow": {"operator": "zero_key", "at_step": 2}}, "at_step: 2", "follows from the stage's place"),
        ({"train_iters": 9}, "train_iters: 9", "follows from the stage's place"),
        ({"model_parallel_size": 3}, "model_parallel_size: 3", "does not split over model_parallel_size 3"),
        ({"ffn_slot_nun": 3}, "ffn_slot_nun: 3", "did you mean ffn_slot_num?"),
    ],
)
def test_a_stage_that_cannot_follow_is_refused_with_file_and_line(
    keys: dict[str, Any], at: str, message: str, tmp_path: Path
) -> None:
    plan = write_plan(tmp_path, {"a": {"steps": 4}, "b": {"steps": 4, "keys": keys}})
    with pytest.raises(ConfigError) as caught:
        run_stages.main([str(plan)])
    assert message in str(caught.value)
    if at != "model_parallel_size: 3":
        assert f"{plan}:{line_of(plan, at)} " in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"a": {}}, "expected either tokens or steps"),
        ({"a": {"steps": 4, "tokens": 4}}, "expected either tokens or steps"),
        ({"a": {"steps": 0}}, "expected a whole number above 0"),
        ({"a": {"tokens": "many"}}, "expected a whole number above 0"),
        ({"a": {"step": 4}}, "did you mean steps?"),
        ({"../a": {"steps": 4}}, "expected a name that a folder can have"),
        ({"a": 4}, "expected some of tokens, steps, restart, keys"),
        ({"a": {"steps": 4, "restart": 1}}, "expected true or false"),
        ({}, "expected stages by name"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(stages: dict[str, Any], message: str, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, stages)
    with pytest.raises(ConfigError, match=f"plan.yml:[0-9]+.*{message}"):
        load_plan(plan)


def test_all_mistakes_of_a_plan_are_reported_at_once(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, {"a": {"steps": 4}, "b": {"steps": 4, "keys": {"hidden_size": 64, "num_layers": 1}}})
    with pytest.raises(ConfigError, match=r"(?s)2 errors.*hidden_size.*num_layers|num_layers.*hidden_size"):
        load_plan(plan)


def test_a_stage_beyond_its_budget_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = load_plan(write_plan(tmp_path, {"a": {"steps": 4}}))
    from types import SimpleNamespace

    newest = SimpleNamespace(path=Path("runs/a/global_step5"), state=SimpleNamespace(iteration=5))
    monkeypatch.setattr(find_checkpoint, "readable_checkpoints", lambda folder: [newest])
    with pytest.raises(CheckpointError, match="ends at step 4, and has trained beyond it"):
        run_stages.StagePlace.of(plan.stages[0])
