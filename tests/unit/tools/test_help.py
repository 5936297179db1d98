"""Every script answers --help at once, from its own parser, without the packages that take seconds to import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers.forkserver import ENVIRONMENT, ROOT

SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.py"), *(ROOT / "tools").rglob("*.py")]
    if 'if __name__ == "__main__":' in path.read_text()
)


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.help_answers", *SCRIPTS],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    return found


def test_all_scripts_are_here(answers: dict[str, Any]) -> None:
    assert {"deepy.py", "train.py", "tools/demo.py", "tools/ckpts/upload.py"} <= set(SCRIPTS)
    assert sorted(answers) == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_comes_before_slow_imports(script: str, answers: dict[str, Any]) -> None:
    answer = answers[script]
    assert answer["code"] in {0, None}
    assert answer["slow"] == []
    assert answer["silent"] == [], "arguments without a word on what they are for"
    assert {"-h", "--help"} <= set(answer["flags"])
    words = answer["text"].replace(",", " ").replace("[", " ").split()
    assert set(answer["flags"]) <= set(words)
