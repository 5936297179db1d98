"""Every command of the documentation is one that its program takes: configurations are checked, flags are parsed.

tests/ranks/test_documented_pages.py runs those that NOT_RUN has no reason for.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from megatron.config.command_line import SCRIPTS, load_command_line
from megatron.config.load_config import load_config
from megatron.config.run_yaml import write_run_yaml
from tests.helpers.documentation import NOT_RUN, Command, SavedFile, commands, pages, steps
from tests.helpers.forkserver import ROOT
from tests.helpers.neox_yamls import write_neox_yamls

RUN_FOLDERS = ("demo/run", "runs/first", "runs/a", "runs/150M", "runs/elastic", "runs/finetuned", "runs/grown")
"""Folders that pages name in place of YAML files."""
ELSEWHERE = {
    "docker": "needs a daemon and an image; the words of train.py are checked",
    "hf": "Hugging Face's own",
    "lm_eval": "lm-eval's own; the tutorial's test runs it",
    "make": "a target of the Makefile, looked up there",
    "pip": "needs a package index",
    "sbatch": "needs Slurm",
    "srun": "needs Slurm",
    "torchrun": "starts train.py, whose words are checked",
}
"""Programs that are not of this project, and why their commands are not parsed whole."""
COMMANDS = commands()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout, with the runs and the files that pages speak of."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "tools").symlink_to(ROOT / "tools")
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").iterdir():
        (folder / "configs" / path.name).symlink_to(path)
    (folder / "neox").mkdir()
    for path in write_neox_yamls(folder / "neox").glob("*.yml"):
        path.rename(folder / "configs" / path.name)
    demo = (ROOT / "configs" / "demo.yml").read_text(encoding="utf-8")
    (folder / "pythia-1b.yml").write_text(demo.replace("save: demo/run\n", ""), encoding="utf-8")
    for run in RUN_FOLDERS:
        (folder / run).mkdir(parents=True)
        write_run_yaml(load_config([ROOT / "configs" / "demo.yml"], [f"save={run}"]).given.text(), folder / run)
    for page in pages():
        for step in steps(page):
            if isinstance(step, SavedFile):
                (folder / step.name).parent.mkdir(exist_ok=True)
                (folder / step.name).write_text(step.text, encoding="utf-8")
    return folder


PARSE = argparse.ArgumentParser.parse_known_args


class _ParsedError(Exception):
    """Raised where a program has taken its arguments, and would begin its work."""


def _parse(self: argparse.ArgumentParser, words: Sequence[str]) -> NoReturn:
    _, rest = PARSE(self, words)
    assert not [word for word in rest if word.startswith("-")], f"unknown flags in {rest}"
    raise _ParsedError


def test_pages_have_commands() -> None:
    assert len({command.page for command in COMMANDS}) > 10
    assert len(COMMANDS) > 50


@pytest.mark.parametrize("pattern", NOT_RUN)
def test_every_reason_not_to_run_is_that_of_a_command(pattern: str) -> None:
    assert any(re.search(pattern, command.line) for command in COMMANDS)


@pytest.mark.parametrize("reason", sorted({reason for reason in NOT_RUN.values() if "tests/" in reason}))
def test_a_test_that_a_reason_names_is_there(reason: str) -> None:
    for path in re.findall(r"tests/[\w/.]+", reason):
        assert (ROOT / path).exists(), path


def test_most_commands_are_run() -> None:
    assert sum(command.reason is None for command in COMMANDS) > 0.7 * len(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_the_command_is_taken(command: Command, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    program, *words = command.words
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), words[0]
        return
    if program in ELSEWHERE:
        words = words[words.index("train.py") :] if "train.py" in words else []
        if not words:
            return
    else:
        assert program == "python", f"{program} is neither of this project nor in ELSEWHERE"
    if words[0] == "deepy.py":
        words = words[1:]
    if words[0] in SCRIPTS:
        # deepy.py reads --dry-run itself, and starts nothing.
        load_command_line([*(word for word in words[1:] if word != "--dry-run"), "--check"], words[0])
        return
    script = Path(words[0])
    assert (ROOT / script).is_file(), f"{script}: no such file"
    module = importlib.import_module(".".join(script.with_suffix("").parts))
    for method in ("parse_args", "parse_intermixed_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, _parse)
    with pytest.raises(_ParsedError):
        module.main(words[1:])
    for word in words[1:]:
        if word.startswith("configs" + os.sep):
            assert (ROOT / word).exists(), f"{word}: no such file"
