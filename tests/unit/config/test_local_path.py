"""URLs where paths are meant are refused by every key and tool, by name."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import ValidationError

from megatron.config.load_config import load_config, load_words
from megatron.config.local_path import holds_paths
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.section_fields import Field, fields
from megatron.errors import ConfigError, UserError
from tests.helpers.forkserver import ROOT
from tests.unit.tools.test_help import SCRIPTS
from tools.ckpts import inspect_checkpoint
from tools.datasets import preprocess_data

DEMO = ROOT / "configs" / "demo.yml"
URLS = {"load", "save_remote"}
PATHS = [field for field in fields().values() if holds_paths(field.schema) and field.key not in URLS]
OPENED = re.compile(r"\b([Ff]older|[Ff]ile|[Pp]refix|[Pp]refixes|path|paths)\b")


def takes_text(field: Field) -> bool:
    return '"string"' in str(field.schema).replace("'", '"') and "enum" not in str(field.schema)


def test_every_key_about_files_is_a_path() -> None:
    mentioned = {field.key for field in fields().values() if takes_text(field) and OPENED.search(field.meaning)}
    # One begins file names of another folder, the other is written into a file of the run's.
    assert mentioned - {field.key for field in PATHS} - URLS == {"eval_results_prefix", "sample_prompts"}
    assert {"save", "data_path", "train_data_paths", "vocab_file", "tensorboard_dir"} <= {field.key for field in PATHS}


@pytest.mark.parametrize("field", PATHS, ids=lambda field: str(field.key))
def test_a_url_is_refused_by_the_name_of_its_key(field: Field) -> None:
    url = "s3://bucket/run"
    given: Any = f"[a, {url}]" if "items" in str(field.schema) else url
    with pytest.raises(ConfigError, match=re.escape(field.key)) as caught:
        load_config([DEMO], [f"{field.key}={given}"])
    remedy = "s3:// is not supported: copy or mount what is there"
    if field.key == "save":
        remedy = f"save to a folder, and set save_remote: {url}, which uploads every checkpoint"
    assert f"on this machine; {remedy}" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("file:///data/run", "leave file:// out"),
        ("https://huggingface.co/EleutherAI/pythia-14m", "the name of that model is EleutherAI/pythia-14m"),
        ("HDFS://x", "HDFS:// is not supported"),
    ],
)
def test_the_remedy_fits_the_url(url: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        load_config([DEMO], [f"eval_hf_model={url}"])


@pytest.mark.parametrize("path", ["runs/a:b", "a//b", "C:/x", "://x", "runs/s3://x", "3s://x"])
def test_other_paths_stay_paths(path: str) -> None:
    assert load_config([DEMO], [f"save='{path}'"]).run.checkpoint.save == path


def test_what_a_checkpoint_recorded_still_loads() -> None:
    run = load_config([DEMO]).run
    recorded = run.model_dump(mode="json")
    recorded["checkpoint"]["save"] = "s3://bucket/run"
    assert RunConfig.model_validate_json(json.dumps(recorded)).checkpoint.save == "s3://bucket/run"
    with pytest.raises(ValidationError):
        RunConfig.model_validate(recorded)


def test_a_url_is_no_yaml_file() -> None:
    with pytest.raises(ConfigError, match=r"gs://b/a.yml: expected a YAML file on this machine"):
        load_words(["gs://b/a.yml"])


def test_tools_refuse_urls(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        inspect_checkpoint.main(["s3://bucket/run"])
    assert "argument path: s3://bucket/run: expected a path on this machine" in capsys.readouterr().err
    words = ["--output-prefix", "x", "--tokenizer-type", "CharLevelTokenizer"]
    with pytest.raises(UserError, match=r"--input s3://b/a.jsonl: expected files on this machine"):
        preprocess_data.main(["--input", "s3://b/a.jsonl", *words])


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.startswith("tools")])
def test_no_flag_of_a_tool_takes_any_text_for_a_path(script: str) -> None:
    assert "type=Path" not in (ROOT / script).read_text()
