"""Every key that NeoX documents, and every value that the published YAMLs use."""

import ast
from pathlib import Path

import pytest

from megatron.config.neox.keys.table import find_entry, key_of, neox_keys, nested_keys
from megatron.config.neox.translate import Translation, translate
from megatron.config.neox_entries import Inert, MapsTo, Rejected
from megatron.config.sections.section_fields import fields
from megatron.config.value_types import mistyped
from megatron.config.yaml.problems import Given, Origin, YamlValue
from megatron.config.yaml.yaml_files import read_yaml

HERE = Path(__file__).parent
ROWS = [line.split("\t") for line in (HERE / "neox_arguments.tsv").read_text().splitlines() if not line.startswith("#")]
NEOX_DEFAULTS: dict[str, YamlValue] = {name: ast.literal_eval(default) for name, default in ROWS}
PUBLISHED = {key: entry.plain() for key, entry in read_yaml(HERE / "published_values.yml")[0].items()}

_TOKENFORMER: dict[str, YamlValue] = {"architecture": "tokenformer"}
# What the meaning of some keys depends on.
CONTEXT: dict[str, dict[str, YamlValue]] = {
    "mlp_multiple_of": {"hidden_size": 768},
    "qkv_slot_num": _TOKENFORMER,
    "proj_slot_num": _TOKENFORMER,
    "ffn_slot_num": _TOKENFORMER,
    "norm_activation_type": _TOKENFORMER,
}


def translated(**flat: YamlValue) -> Translation:
    return translate({key: Given(key, value, Origin("command line")) for key, value in flat.items()})


def test_all_neox_arguments_are_known() -> None:
    assert len(NEOX_DEFAULTS) == 351
    assert [name for name in NEOX_DEFAULTS if name not in neox_keys() and name not in nested_keys()] == []


@pytest.mark.parametrize("name", [name for name, default in NEOX_DEFAULTS.items() if default is not None])
def test_neox_default_may_be_given(name: str) -> None:
    """A YAML that spells a default out asks for nothing special, so it is accepted."""
    assert translated(**{name: NEOX_DEFAULTS[name]}, **CONTEXT.get(name, {})).problems == []


@pytest.mark.parametrize("name", [name for name, default in NEOX_DEFAULTS.items() if default is None])
def test_null_leaves_a_key_unset(name: str) -> None:
    translation = translated(**{name: None})
    assert translation.problems == []
    assert set(translation.settings) == {"model.architecture"}


@pytest.mark.parametrize("key", PUBLISHED)
def test_published_values_are_accepted(key: str) -> None:
    values = PUBLISHED[key]
    assert isinstance(values, list)
    assert values
    for value in values:
        assert translated(**{key: value}, **CONTEXT.get(key, {})).problems == []


def test_every_value_of_the_sections_has_a_key_and_the_other_way_round() -> None:
    mapped = {entry.path for entry in neox_keys().values() if isinstance(entry, MapsTo)}
    assert mapped == set(fields())
    assert all(key_of(path) in neox_keys() for path in fields())


def test_every_entry_says_why() -> None:
    for key, entry in neox_keys().items():
        if isinstance(entry, Inert | Rejected):
            assert len(entry.reason) > 10, key


def test_harmless_values_have_the_type_of_their_key() -> None:
    for key, entry in neox_keys().items():
        if isinstance(entry, Rejected) and entry.accepts is not None:
            assert all(mistyped(value, entry.accepts) is None for value in entry.harmless), key


def test_true_for_a_missing_switch_is_refused() -> None:
    """No switch is ignored when it is on, unless the table gives a reason why nothing computed depends on it."""
    for key, entry in neox_keys().items():
        if isinstance(entry, Rejected) and False in entry.harmless:
            (problem,) = translated(**{key: True}).problems
            assert entry.reason in str(problem)


def test_keys_inside_a_refused_dictionary_are_refused_with_it() -> None:
    assert find_entry("deepspeed_extra_args.hidden_size") is neox_keys()["deepspeed_extra_args"]
    (problem,) = translated(**{"deepspeed_extra_args.hidden_size": 768}).problems
    assert str(problem).startswith("command line deepspeed_extra_args.hidden_size: 768: known to NeoX, not supported")


@pytest.mark.parametrize(
    "key", ["gradient_clipping", "bf16.enabled", "comms_logger.enabled", "zero_optimization.stage"]
)
def test_deepspeeds_keys_mean_the_same_in_its_extra_dictionary(key: str) -> None:
    assert find_entry(f"deepspeed_extra_args.{key}") is neox_keys()[key]
    (problem,) = translated(**{f"deepspeed_extra_args.{key}": "x"}).problems
    assert str(problem).startswith(f"command line deepspeed_extra_args.{key}: x: expected ")


@pytest.mark.parametrize("true_and_one", [(True, 1), (False, 0)])
def test_switches_are_not_numbers(true_and_one: tuple[bool, int]) -> None:
    """In Python True equals 1; in a configuration neither stands for the other."""
    switch, number = true_and_one
    assert translated(use_mup=number).problems != []
    assert translated(moe_num_experts=switch).problems != []
    assert translated(no_weight_tying=number).problems != []
