"""What two configurations do not share."""

from __future__ import annotations

from megatron.config.effective_config import ChangedValue, changed_values
from megatron.config.load_config import load_config
from megatron.config.neox.keys.table import key_of
from megatron.config.sections.section_fields import fields
from tests.helpers.forkserver import ROOT

CONFIGS = ROOT / "configs"
PYTHIA = CONFIGS / "pythia" / "14M.yml"
TOKENFORMER = CONFIGS / "tokenformer" / "150M.yml"


def test_keys_are_named_as_the_yaml_names_them() -> None:
    changes = ["seq_length=1024", "optimizer.params.lr=5e-4", "extra_save_iters=[1, 2]", "save=elsewhere"]
    found = changed_values(load_config([PYTHIA]).run, load_config([PYTHIA], changes).run)
    assert {difference.key: difference.second for difference in found} == {
        "seq_length": 1024,
        "optimizer.params.lr": 5e-4,
        "extra_save_iters": [1, 2],
        "save": "elsewhere",
    }
    assert ChangedValue("seq_length", 2048, 1024) in found


def test_a_section_that_only_one_has() -> None:
    found = {each.key: each for each in changed_values(load_config([PYTHIA]).run, load_config([TOKENFORMER]).run)}
    assert found["architecture"] == ChangedValue("architecture", "gpt_neox", "tokenformer")
    slots = found["qkv_slot_num"]
    assert slots.first is None and isinstance(slots.second, int)


def test_the_same_configuration() -> None:
    run = load_config([PYTHIA]).run
    assert changed_values(run, run.model_validate_json(run.model_dump_json())) == []


def test_every_value_has_a_key() -> None:
    assert all(key_of(path) for path in fields())
