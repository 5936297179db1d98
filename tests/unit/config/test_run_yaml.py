"""run.yml: what a run keeps reads as what was given, and its folder stands in place of YAML files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.command_line import load_command_line, parse_command_line
from megatron.config.load_config import LoadedConfig, load_config
from megatron.config.run_yaml import RUN_YAML, write_run_yaml
from megatron.config.yaml.yaml_files import dump_yaml, read_yaml
from megatron.errors import ConfigError
from tests.helpers.configs import TOKENFORMER

TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=40)
WORDS = st.sampled_from(
    ["6e-4", "yes", "off", "None", "~", "010", "12:30", "0x1F", ".inf", "1_0", "true", "", "a: b #c"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | TEXTS | WORDS,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)
MappingWriter = Callable[..., Path]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(value=VALUES)
def test_what_is_written_is_read_as_it_was(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "value.yml"
    file.write_text(dump_yaml({"key": value, "block": {"inner": value}}), encoding="utf-8")
    entries, problems = read_yaml(file)
    assert not problems
    assert entries["key"].plain() == value
    assert entries["block"].plain() == {"inner": value}
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["key"] == value


def keep(loaded: LoadedConfig, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    assert write_run_yaml(loaded.given.text(), folder)
    return folder


def test_the_kept_configuration_is_the_given_one(write_config: MappingWriter, tmp_path: Path) -> None:
    file = write_config(TOKENFORMER)
    overrides = ["optimizer.params.lr=6e-4", "hysteresis=null", "tokenizer_type=CharLevelTokenizer", "vocab_file=null"]
    first = load_config([file], [f"save={tmp_path / 'a run'}", *overrides])
    folder = keep(first, tmp_path / "a run")

    again = load_config([folder / RUN_YAML])

    assert again.run == first.run
    assert again.given.name == "a run"
    assert yaml.safe_load((folder / RUN_YAML).read_text())["optimizer"]["params"]["lr"] == 6e-4
    assert "optimizer.params.lr=6e-4" in (folder / RUN_YAML).read_text().splitlines()[0]


def test_a_secret_is_refused_before_anything_is_kept(write_config: MappingWriter) -> None:
    for secret in ("wandb_api_key=hunter2", "wandb_host=https://me:hunter2@host"):
        with pytest.raises(ConfigError) as refused:
            load_config([write_config(TOKENFORMER)], [secret])
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("moved", [False, True])
def test_a_command_goes_on_with_the_folder(moved: bool, write_config: MappingWriter, tmp_path: Path) -> None:
    saved = tmp_path / "runs" / "a"
    loaded = load_config([write_config(TOKENFORMER)], [f"save={saved}", "load=elsewhere", "iteration=3"])
    folder = keep(loaded, saved)
    (folder / "global_step4").mkdir()
    if moved:
        folder = folder.rename(tmp_path / 'it\'s moved; "here"')

    _, trains = load_command_line([str(folder), "seed=5"], "train.py")
    _, reads = load_command_line([str(folder), "--iteration", "4"], "generate.py")
    _, newest = load_command_line([str(folder)], "generate.py")

    assert trains.run.checkpoint.save == str(folder)
    assert (trains.run.checkpoint.auto_resume, trains.run.checkpoint.load) == (True, "elsewhere")
    assert trains.run.training.seed == 5
    assert (reads.run.checkpoint.load, reads.run.checkpoint.iteration) == (str(folder), 4)
    assert (newest.run.checkpoint.load, newest.run.checkpoint.iteration) == (str(folder), None)
    assert not trains.warnings and not reads.warnings


def test_a_folder_of_metrics_leads_to_the_checkpoints(write_config: MappingWriter, tmp_path: Path) -> None:
    loaded = load_config([write_config(TOKENFORMER)], [f"save={tmp_path / 'saved'}", f"log_dir={tmp_path / 'log'}"])
    folder = keep(loaded, tmp_path / "log")
    assert load_command_line([str(folder)], "generate.py")[1].run.checkpoint.load == str(tmp_path / "saved")
    assert load_command_line([str(folder)], "train.py")[1].run.checkpoint.save == str(tmp_path / "saved")


def test_a_yaml_comes_before_a_folder_of_its_name(write_config: MappingWriter, tmp_path: Path) -> None:
    file = write_config(TOKENFORMER, "a")
    (file.with_suffix("")).mkdir()
    assert parse_command_line([str(file.with_suffix(""))]).files == (file,)


def test_steps_are_added_and_the_schedule_stays(write_config: MappingWriter) -> None:
    file = write_config(TOKENFORMER, train_iters=80, lr_decay_iters=None)
    longer = load_config([file], ["train_iters=+1000"])
    assert longer.run.training.train_iters == 1080
    assert longer.run.training.lr_schedule.decay_iters == 80
    assert any("train_iters: 80, and 1,000 more: 1,080" in warning for warning in longer.warnings)
    given = load_config([file], ["train_iters=+1000", "lr_decay_iters=500"])
    assert given.run.training.lr_schedule.decay_iters == 500
    assert load_config([file], ["train_iters=1000"]).run.training.lr_schedule.decay_iters is None


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"train_iters": "many"}, ["train_iters=+5"], "train_iters=+5: needs a train_iters in the files"),
        ({"lr_decay_fraction": 0.5}, ["train_iters=+5"], "give lr_decay_iters in its place"),
        ({}, ["train_iters=+0"], "train_iters"),
    ],
)
def test_steps_that_cannot_be_added(
    changes: dict[str, Any], words: list[str], message: str, write_config: MappingWriter
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config([write_config(TOKENFORMER, **changes)], words)
    assert message in str(refused.value)


def test_folders_that_are_no_run_are_refused(write_config: MappingWriter, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: expected a YAML file, or the folder of a run"):
        parse_command_line([str(tmp_path / "empty")])
    file = write_config(TOKENFORMER)
    folder = keep(load_config([file]), tmp_path / "a")
    with pytest.raises(ConfigError, match="a run's folder stands alone"):
        parse_command_line([str(folder), str(file)])


def test_somebodys_own_file_stays(write_config: MappingWriter, tmp_path: Path) -> None:
    text = load_config([write_config(TOKENFORMER)]).given.text()
    (tmp_path / RUN_YAML).write_text("seed: 3\n")
    assert not write_run_yaml(text, tmp_path)
    assert (tmp_path / RUN_YAML).read_text() == "seed: 3\n"


def test_numbers_without_an_end() -> None:
    assert dump_yaml({"a": math.inf}) == "a: .inf\n"
