"""state.json: what a run must know to go on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.checkpointing.states.write_states import RunHeader
from megatron.checkpointing.store.run_state import STATE_FILE, read_state, write_state
from megatron.config.sections.growth import GrowthRecord, GrowthRules, ModelSizes
from megatron.errors import CheckpointError

STATE = RunHeader.new(vocab_size=100, versions={}).state
GROWTH = GrowthRecord(
    iteration=5,
    tokens=320,
    before=ModelSizes(qkv=8, proj=8, ffn=32, num_layers=2),
    after=ModelSizes(qkv=16, proj=16, ffn=64, num_layers=3),
    new_layers=(1,),
    rules=GrowthRules(old_rows_lr=0.0, old_rows_iters=3, new_rows_weight_decay=0.0),
)


def test_growths_come_back(tmp_path: Path) -> None:
    state = replace(STATE, training_flops=1.5e21, growth=(GROWTH, GROWTH))
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state


def test_states_of_earlier_versions_know_of_no_growth(tmp_path: Path) -> None:
    write_state(tmp_path, STATE)
    path = tmp_path / STATE_FILE
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: values[key] for key in values if key not in ("growth", "training_flops")}))
    assert read_state(tmp_path) == STATE


@pytest.mark.parametrize("growth", [3, [3], [{"iteration": 5}], {"a": 1}])
def test_a_damaged_growth_is_named(tmp_path: Path, growth: object) -> None:
    write_state(tmp_path, STATE)
    path = tmp_path / STATE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"growth": growth}))
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        read_state(tmp_path)
