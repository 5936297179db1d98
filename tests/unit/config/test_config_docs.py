"""The generated reference is current, and the schema agrees with the loader."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from megatron.config.neox.keys.table import neox_keys
from megatron.config.neox_entries import MapsTo
from megatron.config.yaml.yaml_files import read_yaml
from tests.helpers.forkserver import ROOT
from tools.generate_config_docs import flat_schema, generated, reference

VALIDATOR = jsonschema.Draft202012Validator(flat_schema())
PUBLISHED = sorted(Path(__file__).parent.glob("published_[pt]*.yml"))
# A plan of staged runs is no configuration.
YAMLS = [file for file in sorted((ROOT / "configs").rglob("*.yml")) if "stages" not in read_yaml(file)[0]] + PUBLISHED


def is_valid(file: Path) -> bool:
    return VALIDATOR.is_valid({key: entry.plain() for key, entry in read_yaml(file)[0].items()})


def test_files_are_current() -> None:
    """When this fails, run `make docs`."""
    for file, text in generated().items():
        assert file.read_text("utf-8") == text


def test_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(flat_schema())


@pytest.mark.parametrize("file", [file for file in YAMLS if "values" not in file.name], ids=lambda file: file.stem)
def test_schema_accepts_what_loads(file: Path) -> None:
    assert is_valid(file)


@pytest.mark.parametrize(
    "name",
    ["mistyped_switches", "mistyped_numbers", "out_of_range", "refused_features", "unknown_choice", "unknown_key",
     "unknown_nested_key", "scalar_for_mapping"],
)  # fmt: skip
def test_schema_refuses_what_does_not(name: str) -> None:
    assert not is_valid(Path(__file__).parent / "broken" / f"{name}.yml")


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        ({"num_gpus": None}, True),
        ({"num-gpus": 2}, True),
        ({"moe_num_experts": 1}, True),
        ({"moe_num_experts": 2}, False),
        ({"flops_profiler": {"enabled": False}}, True),
        ({"tensorboard": {"enabled": False}}, True),
        ({"tensorboard": {"enabled": True}}, False),
        ({"deepspeed_extra_args": {"bf16": {"enabled": True}}}, True),
        ({"deepspeed_extra_args": {"gradient_clipping": 1.0}}, True),
        ({"deepspeed_extra_args": {"hidden_size": 768}}, False),
        ({"optimizer": {"params": {"betas": [0.9]}}}, False),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, True),
        ({"pos_emb": "learned"}, True),
        ({"pos_emb": "alibi"}, False),
        ({"train_iters": 1.5}, False),
    ],
)
def test_schema_in_detail(value: dict[str, Any], valid: bool) -> None:
    assert VALIDATOR.is_valid(value) is valid


def test_reference_has_every_key() -> None:
    text = reference()
    assert [key for key in neox_keys() if f"| `{key}` |" not in text] == []


def test_reference_says_what_every_key_means() -> None:
    rows = [line.split(" | ") for line in reference().splitlines() if line.startswith("| `")]
    meanings = {row[0].strip("| `"): row[4] for row in rows if len(row) == 6}
    mapped = [key for key, entry in neox_keys().items() if isinstance(entry, MapsTo)]
    assert set(mapped) == set(meanings)
    assert [key for key, meaning in meanings.items() if len(meaning) < 5] == []
