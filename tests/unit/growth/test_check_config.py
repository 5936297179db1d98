"""Growth that a configuration asks for is held to its operator and to all checks before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.config.load_config import load_config
from megatron.errors import ConfigError
from megatron.growth.check_config import require_growable
from tests.helpers.commands import run_command
from tests.helpers.configs import PYTHIA, TOKENFORMER

GROW: dict[str, Any] = {"operator": "zero_key", "at_step": 4}


def write(folder: Path, settings: dict[str, Any], **grow: Any) -> Path:
    path = folder / "run.yml"
    path.write_text(yaml.safe_dump(settings | {"save": "run", "grow": GROW | grow}, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("changes", "grow", "message"),
    [
        ({}, {"factor": 2}, None),
        ({}, {"qkv_slot_num": 32, "operator": "mask_ramp", "ramp_iters": 5}, None),
        ({}, {"operator": "stack", "factor": 2}, None),
        ({"model_parallel_size": 4}, {"factor": 1.25}, r"qkv_slot_num: 30: does not split over model_parallel_size 4"),
        ({}, {"factor": 1.01}, r"nothing to grow|sizes"),
        ({"norm_activation_type": "softmax"}, {"factor": 2}, r"softmax: every new token takes a share"),
        ({"norm_activation_type": "softmax"}, {"factor": 2, "allow_inexact": True}, None),
        ({}, {"factor": 2, "ramp_iters": 5}, r"grow\.ramp_iters: 5: has no effect with zero_key"),
        ({}, {"factor": 1.5, "operator": "copy"}, r"qkv_slot_num: 36"),
        ({}, {"factor": 2, "operator": "published"}, r"grow\.moments: keep, grow\.schedule: continue: published"),
    ],
)
def test_what_an_operator_requires(
    changes: dict[str, Any], grow: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    path = write(tmp_path, TOKENFORMER | changes, **grow)
    loaded = load_config([path])
    if message is None:
        (line,) = require_growable(loaded)
        assert line.startswith(f"grows by {grow.get('operator', 'zero_key')} after step 4: ")
        return
    number = 1 + next(n for n, text in enumerate(path.read_text().splitlines()) if text.startswith("  operator:"))
    with pytest.raises(ConfigError, match=message) as caught:
        require_growable(loaded)
    assert str(caught.value).startswith(f"{path}:{number} grow: the larger model: ")


def test_a_model_without_parameter_tokens_grows_by_layers(tmp_path: Path) -> None:
    require_growable(load_config([write(tmp_path, PYTHIA, operator="insert", num_layers=3)]))
    with pytest.raises(ConfigError, match="only a TokenFormer has parameter tokens"):
        require_growable(load_config([write(tmp_path, PYTHIA, factor=2)]))


def test_check_says_it_before_any_rank_starts(tmp_path: Path) -> None:
    path = write(tmp_path, TOKENFORMER | {"norm_activation_type": "softmax", "padded_vocab_size": 512}, factor=2)
    refused = run_command(["deepy.py", "train.py", str(path), "--check"])
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "softmax: every new token takes a share" in refused.stderr
    assert "Traceback" not in refused.stderr
    valid = run_command(["deepy.py", "train.py", str(path), "--check", "norm_activation_type=gelu_l2_norm"])
    assert (valid.returncode, valid.stdout.splitlines()[0]) == (0, "the configuration is valid"), valid.stderr
    assert valid.stdout.splitlines()[-2] == (
        "grows by zero_key after step 4: qkv 24 to 48, proj 40 to 80, ffn 48 to 96; 57,408 parameters"
    )
