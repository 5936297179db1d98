"""Guards: unit tests start no ranks, and leave the environment as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import pytest

from tests.helpers.forkserver import CONTEXT

LAUNCHERS = {"train.py", "generate.py", "eval.py", "deepy.py", "torchrun", "srun"}


def refuse(*_: Any, **__: Any) -> NoReturn:
    """Fails the test that asked for ranks."""
    pytest.fail("a unit test starts ranks: it belongs to tests/ranks or tests/faults")


class WithoutLaunchers(subprocess.Popen):  # type: ignore[type-arg]
    """A process that launches no ranks; with `--check`, `--dry-run` or `--help` a launcher only answers."""

    def __init__(self, args: Any, *more: Any, **options: Any) -> None:
        names = {Path(word).name for word in ([args] if isinstance(args, str) else args)}
        if LAUNCHERS & names and not names & {"--check", "--help", "--dry-run"}:
            refuse()
        super().__init__(args, *more, **options)


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Takes back the variables that scripts set for their ranks."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes process groups, forked ranks and launchers fail the test."""
    monkeypatch.setattr(CONTEXT, "Process", refuse)
    monkeypatch.setattr(subprocess, "Popen", WithoutLaunchers)
    if (distributed := sys.modules.get("torch.distributed")) is not None:
        monkeypatch.setattr(distributed, "init_process_group", refuse)
