"""Every command of the documentation is one that its program takes: configurations are checked, flags are parsed."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from megatron.config.command_line import SCRIPTS, load_command_line
from megatron.config.load_config import load_config
from megatron.config.run_yaml import write_run_yaml
from tests.helpers.forkserver import ROOT

FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<block>.*?)^```", re.MULTILINE | re.DOTALL)
RUN_FOLDERS = ("demo/run", "runs/a", "runs/150M", "runs/elastic")
"""Folders that pages name in place of YAML files."""
ELSEWHERE = {
    "docker": "needs a daemon and an image; the words of train.py are checked",
    "make": "a target of the Makefile, looked up there",
    "pip": "needs a package index",
    "sbatch": "needs Slurm",
    "srun": "needs Slurm",
    "torchrun": "starts train.py, whose words are checked",
}
"""Programs that are not of this project, and why their commands are not parsed whole."""


@dataclass(frozen=True)
class Command:
    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def pages() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "*.md"], check=True, cwd=ROOT, capture_output=True, text=True)
    return [page for page in listed.stdout.split() if page != "CHANGELOG.md"]


def commands() -> Iterator[Command]:
    for page in pages():
        text = (ROOT / page).read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match["language"] not in {"", "bash", "console"}:
                continue
            for line in match["block"].replace("\\\n", " ").splitlines():
                # What a synopsis has in brackets may be left out.
                words = shlex.split(re.sub(r" \[[^\]=]*\]", "", line), comments=True)
                if words and not line.startswith((" ", "{")):
                    yield Command(page, tuple(words))


COMMANDS = list(commands())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout, with the runs that pages speak of."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "tools"):
        (folder / name).symlink_to(ROOT / name)
    for run in RUN_FOLDERS:
        (folder / run).mkdir(parents=True)
        write_run_yaml(load_config([ROOT / "configs" / "demo.yml"], [f"save={run}"]).given.text(), folder / run)
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
