"""Learning rates, freezing and weight decay by row after a growth, against AdamW by row in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron.checkpointing.states.read_states import read_states
from megatron.checkpointing.store.checkpoint import read_checkpoint
from tests.helpers.configs import TOKENFORMER, layout_keys
from tests.helpers.grown_runs import GrownRun
from tests.helpers.records import records
from tests.helpers.runs import train

GROWN, FROZEN, STEPS, BATCH = 4, 5, 12, 8
SIZES = {"qkv_slot_num": 40, "ffn_slot_num": 84}
RULES: dict[str, dict[str, Any]] = {
    "frozen, warmed up, decayed": {
        "operator": "zero_key",
        "old_rows_lr": 0,
        "old_rows_iters": FROZEN,
        "learning_rate": "rewarm_new",
        "rewarm_iters": 7,
        "new_rows_weight_decay": 0.5,
    },
    "slowed": {"operator": "zero_key", "moments": "reset_new", "old_rows_lr": 0.25, "old_rows_iters": 6},
    "all warmed up": {
        "operator": "zero_key",
        "moments": "reset_all",
        "old_rows_lr": 0.5,
        "old_rows_iters": 3,
        "learning_rate": "rewarm_all",
        "rewarm_iters": 5,
        "new_rows_weight_decay": 0.0,
    },
    "ramp": {"operator": "mask_ramp", "ramp_iters": 4, "learning_rate": "rewarm_new", "rewarm_iters": 3},
}
FULL = pytest.mark.full
CASES = [
    pytest.param("frozen, warmed up, decayed", (1, 1, 2), id="frozen-dp2"),
    pytest.param("ramp", (2, 1, 1), id="ramp-tp2"),
    pytest.param("frozen, warmed up, decayed", (2, 2, 1), id="frozen-tp2-pp2", marks=FULL),
    pytest.param("slowed", (2, 1, 1), id="slowed-tp2", marks=FULL),
    pytest.param("all warmed up", (1, 2, 1), id="all-pp2", marks=FULL),
    pytest.param("ramp", (1, 1, 2), id="ramp-dp2", marks=FULL),
    pytest.param("slowed", (1, 2, 2), id="slowed-pp2-dp2", marks=FULL),
]
FUSED = {"torch_fused_adamw": "on"}


def grown_run(
    folder: Path, dataset: Path, rules: dict[str, Any], layout: tuple[int, int, int], **keys: Any
) -> dict[str, Any]:
    """Trains with a growth after GROWN steps; returns the keys."""
    accumulated = layout_keys(*layout, batch=BATCH, accumulation=layout[1])
    settings = TOKENFORMER | accumulated | {"train_iters": STEPS, "gradient_clipping": 0.5}
    settings |= {"grow": SIZES | {"at_step": GROWN} | rules, "extra_save_iters": [GROWN, GROWN + FROZEN]} | keys
    config = folder / "run.yml"
    paths = {"data_path": str(dataset), "save": str(folder / "run"), "index_cache_dir": str(folder)}
    config.write_text(yaml.safe_dump(settings | paths))
    train(config, ranks=math.prod(layout))
    return settings


@pytest.mark.parametrize(("rules", "layout"), CASES)
def test_rows_train_as_in_float64(rules: str, layout: tuple[int, int, int], dataset: Path, tmp_path: Path) -> None:
    settings = grown_run(tmp_path, dataset, RULES[rules], layout)
    assert_like_float64(settings, tmp_path / "run", dataset)
    # A decay of the new rows' own holds for ever; all else runs out.
    over = {"slowed": 10, "all warmed up": None, "ramp": 7}.get(rules)
    output = (tmp_path / "output0.rank0").read_text()
    assert ("train alike" in output) == (over is not None)
    assert over is None or f"step {over}: from here on, rows from before and after growth train alike" in output


@pytest.mark.full
def test_rows_train_as_in_float64_with_a_fused_kernel(dataset: Path, tmp_path: Path) -> None:
    settings = grown_run(tmp_path, dataset, RULES["frozen, warmed up, decayed"], (1, 1, 2), **FUSED)
    assert_like_float64(settings, tmp_path / "run", dataset)


def assert_like_float64(settings: dict[str, Any], run: Path, dataset: Path) -> None:
    reference = GrownRun(settings, BATCH)
    reference.load(run / f"global_step{GROWN}")
    expected = list(reference.follow(dataset, STEPS - GROWN))
    losses, norms = (list(records(run, key).values())[GROWN:] for key in ("train/lm_loss", "train/grad_norm"))
    assert losses == pytest.approx([loss for loss, _ in expected], abs=1e-6, rel=0)
    assert norms == pytest.approx([norm for _, norm in expected], abs=1e-5, rel=0)
    assert max(norms) > 0.5, "clipping was never active"
    for layer in read_states(read_checkpoint(run / f"global_step{STEPS}")):
        for name, state in layer.by_global_name():
            assert state.master is not None
            torch.testing.assert_close(state.master.double(), reference.weights[name].detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("fp32", marks=FULL)])
def test_frozen_rows_do_not_change_by_a_bit(precision: str, dataset: Path, tmp_path: Path) -> None:
    """Over five steps with weight decay, and neither do their moments; then they train on."""
    rules = RULES["frozen, warmed up, decayed"]
    grown_run(tmp_path, dataset, rules, (1, 1, 2), precision=precision)
    grown, still, last = (
        {
            name: state
            for layer in read_states(read_checkpoint(tmp_path / "run" / f"global_step{step}"))
            for name, state in layer.by_global_name()
        }
        for step in (GROWN, GROWN + FROZEN, STEPS)
    )
    old = {"query": 24, "key": 24, "value": 24, "proj": 40, "mlp": 48}
    for name, before in grown.items():
        rows = old[name.split(".")[-2]] if name.endswith("_tokens") else len(before.weight)
        after = still[name]
        pairs = [(before.weight, after.weight), (before.master, after.master)]
        pairs += [(before.moments[moment], after.moments[moment]) for moment in before.moments]
        for one, other in pairs:
            assert one is not None and other is not None
            assert torch.equal(one[:rows], other[:rows]), name
        if rows < len(before.weight):
            assert not torch.equal(before.weight[rows:], after.weight[rows:]), f"{name}: new rows train"
        assert after.master is not None and last[name].master is not None
        assert not torch.equal(after.master[:rows], last[name].master[:rows]), f"{name}: old rows train again"
