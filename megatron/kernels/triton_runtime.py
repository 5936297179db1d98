"""Conditions for Triton on this machine, without importing it."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

from megatron.kernels.backends import Machine


def is_interpreted() -> bool:
    """Tells whether Triton's kernels run in its interpreter, as the variable TRITON_INTERPRET asks for."""
    return os.environ.get("TRITON_INTERPRET", "0") in {"1", "true", "on"}


def triton_obstacle(machine: Machine) -> str | None:
    """Returns why Triton's kernels cannot run there, and the remedy; None when they can.

    For every kernel Triton builds a launcher in C against Python's headers, when it is first called.
    """
    if is_interpreted():
        return None
    if not machine.on_gpu:
        return "Triton compiles for GPUs, and torch sees none. Use auto or eager."
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler) is None:
        named = "gcc or clang" if compiler is None else repr(compiler)
        return f"Triton builds its launchers with a C compiler, and there is no {named}. Install one, or name it in CC."
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"Triton builds its launchers against Python's headers, and there is no {header}. Install python3-dev."
    return None
