"""A guard: unit tests start no ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.helpers.forkserver import CONTEXT

LAUNCHERS = {"train.py", "generate.py", "eval.py", "deepy.py", "torchrun", "srun"}


def refuse(*_: Any, **__: Any) -> NoReturn:
    """Fails the test that asked for ranks."""
    pytest.fail("a unit test starts ranks: it belongs to tests/ranks or tests/faults")


class WithoutLaunchers(subprocess.Popen):  # type: ignore[type-arg]
    """A process that launches no ranks; with `--check` a launcher only answers."""

    def __init__(self, args: Any, *more: Any, **options: Any) -> None:
        names = {Path(word).name for word in ([args] if isinstance(args, str) else args)}
        if LAUNCHERS & names and "--check" not in names:
            refuse()
        super().__init__(args, *more, **options)


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes process groups, forked ranks and launchers fail the test."""
    monkeypatch.setattr(CONTEXT, "Process", refuse)
    monkeypatch.setattr(subprocess, "Popen", WithoutLaunchers)
    if (distributed := sys.modules.get("torch.distributed")) is not None:
        monkeypatch.setattr(distributed, "init_process_group", refuse)
