"""--plan, and what --check and a start say of memory, by the user's commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config.command_line import load_command_line, parse_command_line
from megatron.config.load_config import load_config
from megatron.errors import ConfigError
from megatron.training.check_config import require_trainable
from megatron.training.plan_run import plan_report
from tests.helpers.forkserver import ROOT

LARGE = str(ROOT / "configs/tokenformer/1-5B.yml")


@pytest.fixture(autouse=True)
def no_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_plan_of_the_largest_recipe_needs_no_torch() -> None:
    code = (
        f"import sys, deepy; deepy.main(['train.py', {LARGE!r}, '--plan', '--world-size', '64', '--device', 'a100'])\n"
        "assert not {'torch', 'deepspeed'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for expected in (
        "1,587,219,456 parameters on 64 x a100-80gb, 8 a machine, 8 machines",
        "memory of a rank [GiB]",
        "time of a step",
        "GPU hours",
        "MWh",
        "checkpoints: none, for `save` is not set",
        "the fastest, as keys to paste",
        "assumed from the data sheet of a100-80gb, not measured",
    ):
        assert expected in done.stdout, expected


def check(*words: str) -> str:
    command = parse_command_line([*words, "--check"], "train.py")
    return "\n".join(require_trainable(load_config(command.files, command.overrides), command))


def test_check_warns_where_it_does_not_fit_and_proposes_what_does() -> None:
    found = check(LARGE, "checkpoint_activations=false", "--world-size", "8", "--device", "a100-40gb")
    assert "warning: memory does not fit: a rank needs" in found
    assert "of 39.30 GiB that a rank of a100-40gb can use" in found
    assert "the fastest layout that fits: model_parallel_size=" in found
    assert check(LARGE, "--world-size", "64", "--device", "a100-80gb").startswith("memory fits: a rank needs")


def test_what_no_device_holds_is_refused_with_sizes_that_fit() -> None:
    loaded = load_config([Path(LARGE)], ["hidden_size=153600"])
    with pytest.raises(ConfigError) as caught:
        require_trainable(loaded)
    message = str(caught.value)
    assert message.startswith(f"{LARGE}:9 num_layers: a rank would need ")
    assert "GiB of gradients" in message
    assert "It would have room with model_parallel_size=" in message
    with pytest.raises(ConfigError, match=r"train_micro_batch_size_per_gpu: a rank would need .* of activations"):
        require_trainable(
            load_config(
                [Path(LARGE)],
                ["train_micro_batch_size_per_gpu=65536", "train_batch_size=null", "checkpoint_activations=false"],
            )
        )


def test_flags_that_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    for words, script, message in (
        (["a.yml", "--plan"], "generate.py", "--plan is about training"),
        (["a.yml", "--plan", "--preflight"], "train.py", "--plan and --preflight are done one after the other"),
        (["a.yml", "--device", "h200"], "train.py", "goes with --plan or --check"),
    ):
        with pytest.raises(SystemExit):
            parse_command_line(words, script)
        assert message in capsys.readouterr().err


def test_an_unknown_vocabulary_is_assumed_and_said() -> None:
    words = [str(ROOT / "configs/demo.yml"), "vocab_file=nothing/here.json", "--plan", "--device", "cpu"]
    command, loaded = load_command_line(words, "train.py")
    assert command.answered
    report = plan_report(loaded, command)
    assert "a vocabulary of 50,304: padded_vocab_size is not given, and there is no tokenizer yet" in report
    assert "a guess: nothing was measured on this machine; --calibrate does" in report
