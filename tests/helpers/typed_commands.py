"""Commands as users type them, each in a fork of a process that has imported everything already.

A fork is as separate as any other process, and saves the seconds of its imports. Where `deepy.py` replaces itself by a
rank, the fork goes on as that rank.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from unittest import mock

from tests.helpers.forkserver import CONTEXT, ENVIRONMENT, preload_evaluation

SECONDS = 600
"""Time that a command may take on a busy machine [s]."""
INPUT = "The list of\n"
"""What a user types, where a command reads what is typed."""

preload_evaluation()


@dataclass(frozen=True)
class Typed:
    """How a command has ended."""

    code: int | None
    """Exit code; None when it was still running after SECONDS."""
    output: str


def run_python(words: Sequence[str], folder: Path) -> Typed:
    """Runs `python WORDS` in a folder: a script and its arguments, `-m` and a module, or `-c` and a program."""
    output = folder / ".output"
    with mock.patch.dict(os.environ, ENVIRONMENT):
        process = CONTEXT.Process(target=_run, args=(list(words), str(folder), str(output)))
        process.start()
        process.join(SECONDS)
        code = process.exitcode
        process.kill()
    text = output.read_text(errors="replace")
    output.unlink()
    return Typed(code, text)


def _run(words: list[str], folder: str, output: str) -> None:
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(folder)
    os.environ.update(ENVIRONMENT)
    os.execve = _go_on  # type: ignore[assignment]
    reader, writer = os.pipe()
    os.write(writer, INPUT.encode())
    os.close(writer)
    os.dup2(reader, 0)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
    _interpret(words)


def _go_on(program: str, words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Stands for `os.execve` of another Python."""
    assert program == sys.executable
    os.environ.update(environment)
    _interpret([word for word in words[1:] if word != "-u"])


def _interpret(words: Sequence[str]) -> NoReturn:
    if words[0] == "-c":
        exec(compile(words[1], "<page>", "exec"), {"__name__": "__main__"})  # noqa: S102 - a page of this project
    elif words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
    sys.exit(0)
