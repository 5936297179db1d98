"""deepy.py as users start it: usage, missing scripts, and wrong keys before torch is imported."""

from __future__ import annotations

from tests.helpers.commands import run_command


def test_usage_and_missing_scripts() -> None:
    finished = run_command(["deepy.py"])
    assert finished.returncode == 2 and "usage: python deepy.py SCRIPT.py" in finished.stderr
    finished = run_command(["deepy.py", "trian.py", "configs/demo.yml"])
    assert finished.returncode == 2 and "trian.py: no such script" in finished.stderr
