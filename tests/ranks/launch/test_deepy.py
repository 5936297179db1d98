"""deepy.py as users start it: help, usage, missing scripts, other folders, and wrong keys before torch is imported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron.config.command_line import SCRIPTS, command_parser
from tests.helpers.commands import run_command
from tests.helpers.forkserver import ROOT


def test_usage_and_missing_scripts() -> None:
    finished = run_command(["deepy.py"])
    assert finished.returncode == 2 and "usage: python deepy.py SCRIPT.py" in finished.stderr
    finished = run_command(["deepy.py", "trian.py", "configs/demo.yml"])
    assert finished.returncode == 2 and "trian.py: no such script" in finished.stderr


@pytest.mark.parametrize("script", [None, *SCRIPTS])
def test_help_lists_the_flags_of_each_script(script: str | None) -> None:
    finished = run_command(["deepy.py", *([script] if script else []), "--help"])
    assert (finished.returncode, finished.stderr) == (0, "")
    words = finished.stdout.replace(",", " ").split()
    for group in command_parser()._action_groups:
        scripts = re.findall(r"\w+\.py", group.title or "")
        shown = script is None or not scripts or script in scripts
        for flag in (flag for action in group._group_actions for flag in action.option_strings):
            assert (flag in words) == shown, flag
    for name, does in SCRIPTS.items():
        assert (does in finished.stdout) == (script in {None, name})


def test_scripts_run_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit('another project')")
    words = ["deepy.py", "train.py", str(ROOT / "configs" / "demo.yml"), "--check"]
    finished = run_command(words, folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "the configuration is valid" in finished.stdout


def test_a_path_of_the_checkout_is_told_in_other_folders(tmp_path: Path) -> None:
    finished = run_command(["deepy.py", "train.py", "configs/demo.yml"], folder=tmp_path)
    assert finished.returncode == 2
    assert f"Paths are as seen from {tmp_path}; run the command in {ROOT}" in finished.stderr
    finished = run_command(["deepy.py", "train.py", "configs/nowhere.yml"], folder=tmp_path)
    assert "configs/nowhere.yml: cannot be read" in finished.stderr and "as seen from" not in finished.stderr
