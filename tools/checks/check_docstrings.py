"""Checks how docstrings begin: a function's with a verb, a class's and a module's never with an indirect question.

    python tools/checks/check_docstrings.py            fail, with file:line and the opening of each wrong docstring
    python tools/checks/check_docstrings.py --list     show them and end with 0

A function or method, public or not, says what it does in the third person: "Returns the samples of a step", not "The
samples of a step", "Return the samples" or "Which samples". No rule of spelling tells a verb from a plural ("Counts",
"Bytes"), so verbs.txt lists the verbs, as pydocstyle's check does; a new one is a line there. Before "of", as in
"Counts of tokens", a listed word is a noun.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_tokenformer import run_tool

from tools.command_line import tool_parser

ROOT = Path(__file__).resolve().parents[2]
CHECKED = ("megatron/**/*.py", "tools/**/*.py", "*.py")
VERBS = Path(__file__).with_name("verbs.txt")
QUESTIONS = frozenset({"How", "What", "When", "Where", "Whether", "Which", "Who", "Whose", "Why"})
OPENING_WORDS = 6

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class WrongOpening:
    """A docstring that begins as none should."""

    file: Path
    line: int
    opening: str
    """Its first words."""
    rule: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.opening!r}: {self.rule}"


def main(argv: Sequence[str]) -> int:
    """Prints the docstrings that begin wrongly; returns 1 when there are any, and with --list always 0."""
    parser = tool_parser(__doc__)
    parser.add_argument("--list", action="store_true", help="end with 0 whatever there is")
    options = parser.parse_args(argv)
    found = sorted(wrong_openings(ROOT, checked_files()), key=lambda each: (each.file, each.line))
    for each in found:
        print(each)
    print(f"{len(found)} docstrings begin wrongly")
    return int(bool(found) and not options.list)


def checked_files() -> list[Path]:
    """Returns the files of everything that ships."""
    return [file for pattern in CHECKED for file in sorted(ROOT.glob(pattern))]


def wrong_openings(root: Path, files: Iterable[Path]) -> Iterator[WrongOpening]:
    """Yields the docstrings of `files` that begin wrongly, with paths below `root`."""
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, Definition):
                continue
            words = (ast.get_docstring(node) or "").split()
            rule = broken_rule(node, words)
            if rule is not None:
                # A module has no line of its own; its docstring begins the file.
                yield WrongOpening(file.relative_to(root), node.body[0].lineno, " ".join(words[:OPENING_WORDS]), rule)


def broken_rule(node: Definition, words: Sequence[str]) -> str | None:
    """Returns the rule that a docstring of these words breaks, and None when it is absent or begins well."""
    if not words:
        return None
    if isinstance(node, ast.Module | ast.ClassDef):
        return "begin with a noun or a verb, not with a question" if words[0] in QUESTIONS else None
    if words[0].rstrip(",:") in verbs() and words[1:2] != ["of"]:
        return None
    return f"begin with a verb in the third person ({VERBS.name} lists them)"


@cache
def verbs() -> frozenset[str]:
    """Reads the verbs that a docstring may begin with."""
    return frozenset(VERBS.read_text("utf-8").split())


if __name__ == "__main__":
    run_tool(main)
