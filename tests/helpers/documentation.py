"""What the pages of the documentation tell their reader to type, and which of it no test can run."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from tests.helpers.forkserver import ROOT

FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<block>.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = ("", "bash", "console")
FILE = re.compile(r"# (?P<name>[\w./-]+\.(?:ya?ml|txt))\n")
"""First line of a block that a reader is to save under that name."""

NOT_RUN: dict[str, str] = {
    r"^pip install|prepare_data\.py -d .* pile$|upload\.py|--hf_model EleutherAI": "needs the network",
    r"^hf download": "needs the network; the tutorial's test writes weights of the published names and shapes",
    r"eval\.py .*--eval_tasks (lambada_openai|arc_easy)": (
        "needs the network: the tasks' questions; tests/ranks/inference/evaluation scores tasks on local files, and so "
        "does the tutorial"
    ),
    r"^sbatch|^srun|clusters/slurm(?!.*--dry-run)|^torchrun": "needs Slurm; make test-cluster",
    r"docker run": "needs a daemon and an image",
    r"^make demo": "takes minutes; tests/ranks/tools/test_demo.py makes demos of small texts",
    r"^make test": "is what runs this",
    r"num_gpus=8": "needs 8 processors; tests/ranks/tools/test_run_stages.py trains such a plan",
    r"--live": "serves until it is stopped; tests/unit/tools/test_report_browser.py follows a run",
    r"--calibrate|benchmark_plan\.py": "measures for minutes; tests/unit/planner",
    r"run_matrix\.py tools/experiments/\w+\.yml$": "computes for hours; tests/unit/tools/experiments",
    r"FILE_OR_FOLDER|--input FOLDER": "is a synopsis",
}
"""Patterns of commands that tests/ranks/test_documented_pages.py does not run, and why. All are parsed all the same."""

SYNOPSES = ("megatron/checkpointing/README.md",)
"""Pages whose Python shows the shape of a program that the reader is to write."""


@dataclass(frozen=True)
class Command:
    """A line of a page."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        """The words without comments; what a synopsis has in brackets may be left out."""
        return shlex.split(re.sub(r" \[[^\]=]*\]", "", self.line), comments=True)

    @property
    def reason(self) -> str | None:
        """Why no test runs it; None when one does."""
        return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, self.line)), None)

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"


@dataclass(frozen=True)
class Program:
    """A block of Python."""

    page: str
    text: str


@dataclass(frozen=True)
class SavedFile:
    """A block that a reader is to save."""

    page: str
    name: str
    text: str


Step = Command | Program | SavedFile


def pages() -> list[str]:
    """All pages, by their paths in the checkout."""
    listed = subprocess.run(["git", "ls-files", "*.md"], check=True, cwd=ROOT, capture_output=True, text=True)
    return [page for page in listed.stdout.split() if page != "CHANGELOG.md"]


def steps(page: str) -> Iterator[Step]:
    """Yields what a reader of the page does, in its order."""
    for match in FENCE.finditer((ROOT / page).read_text(encoding="utf-8")):
        language, block = match["language"], match["block"]
        if language in SHELL:
            lines = block.replace("\\\n", " ").splitlines()
            yield from (Command(page, re.sub(r" +", " ", line)) for line in lines if line and line[0] not in " {#")
        elif language == "python" and page not in SYNOPSES:
            yield Program(page, block)
        elif saved := FILE.match(block):
            yield SavedFile(page, saved["name"], block)


def commands() -> list[Command]:
    """All commands of all pages."""
    return [step for page in pages() for step in steps(page) if isinstance(step, Command)]
