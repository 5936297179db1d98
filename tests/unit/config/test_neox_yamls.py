"""NeoX's own YAMLs beside its local setup: those that ask for what exists here load, others say what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config.command_line import load_command_line
from megatron.config.model_size import count_parameters
from megatron.errors import ConfigError
from tests.helpers.neox_yamls import ALONE, LLAMAS, LOADABLE, NOT_HERE, write_neox_yamls


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_neox_yamls(tmp_path_factory.mktemp("neox") / "configs"))


@pytest.mark.parametrize("setup", ["local_setup.yml", "local_setup_wandb.yml"])
@pytest.mark.parametrize("name", LOADABLE)
def test_what_exists_here_loads(name: str, setup: str, configs: str) -> None:
    _, loaded = load_command_line(["-d", configs, name, setup, "--check"])
    assert loaded.run.checkpoint.load == loaded.run.checkpoint.save == "checkpoints"
    named = "\n".join(loaded.warnings)
    assert loaded.run.launch.hostfile == LOADABLE[name].get("hostfile")
    assert ("comms_logger" in named) == ("deepspeed_extra_args" in LOADABLE[name])


@pytest.mark.parametrize("name", LLAMAS)
def test_gated_models_are_llamas_of_their_published_size(name: str, configs: str) -> None:
    _, width, kv_heads, parameters = LLAMAS[name]
    """NeoX gives its newer MLP biases unless told otherwise, which LLaMA's has not; its older one never has any."""
    _, loaded = load_command_line(["-d", configs, name, "local_setup.yml", "--check"])
    model = loaded.run.model
    assert (model.architecture, model.norm, model.activation) == ("llama", "rmsnorm", "swiglu")
    assert (model.ffn_hidden_size, model.num_kv_heads) == (width, kv_heads)
    assert model.use_bias_in_mlp == ("mlp_type" not in LLAMAS[name][0])
    biases = model.num_layers * (2 * width + model.hidden_size) if model.use_bias_in_mlp else 0
    assert count_parameters(model, 32_000) == parameters + biases


@pytest.mark.parametrize("name", ALONE)
def test_what_names_its_own_data_loads_alone(name: str, configs: str) -> None:
    _, loaded = load_command_line(["-d", configs, name, "save=checkpoints", "--check"])
    assert loaded.run.data.data_path or loaded.run.data.train_data_paths
    assert loaded.run.training.precision.dtype == ("bf16" if "bf16" in ALONE[name] else "fp16")


def test_keys_of_a_loss_scaler_have_no_effect_in_bf16(configs: str) -> None:
    _, loaded = load_command_line(["-d", configs, "bf16_with_its_fp16_keys.yml", "--check"])
    named = next(warning for warning in loaded.warnings if warning.startswith("keys without effect here: "))
    scaler = ("loss_scale", "loss_scale_window", "hysteresis", "min_loss_scale", "initial_scale_power")
    assert {f"bf16.{key}" for key in ("auto_cast", *scaler)} <= set(named.replace(",", "").split())


def test_fp16_of_type_bfloat16_is_bf16(configs: str) -> None:
    _, loaded = load_command_line(["-d", configs, "pythia/1B.yml", "local_setup.yml", "--check"])
    assert loaded.run.training.precision.dtype == "bf16"


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_is_missing_is_named(name: str, configs: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_command_line(["-d", configs, name, "local_setup.yml", "--check"])
    assert NOT_HERE[name][1] in str(caught.value)
    assert "unknown key" not in str(caught.value)


def test_data_of_its_own_contradicts_the_setup(configs: str) -> None:
    """NeoX compares `vocab-file` with `vocab_file` and lets the later one win: another tokenizer than the data's."""
    with pytest.raises(ConfigError, match=r"vocab_file: duplicate key; also in .*14M\.yml"):
        load_command_line(["-d", configs, "pythia/14M.yml", "local_setup.yml", "--check"])


def test_two_setups_contradict_as_in_neox(configs: str) -> None:
    with pytest.raises(
        ConfigError, match=r"local_setup_wandb\.yml:3 data_path: duplicate key; also in .*local_setup\.yml:3"
    ):
        load_command_line(["-d", configs, "125M.yml", "local_setup.yml", "local_setup_wandb.yml", "--check"])


def test_the_cpu_example_adds_its_mock(configs: str, tmp_path: Path) -> None:
    mock = tmp_path / "cpu_mock_config.json"
    mock.write_text('{"global_num_gpus": 1}')
    _, loaded = load_command_line(["-d", configs, "125M.yml", "local_setup.yml", str(mock), "--check"])
    assert any("global_num_gpus: 1: no effect: " in warning for warning in loaded.warnings)
