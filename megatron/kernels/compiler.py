"""Conditions for torch.compile on this machine."""

from __future__ import annotations

import os
import shutil

from megatron.kernels.backends import INSTALL
from megatron.registry import is_installed


def compiler_obstacle(on_gpu: bool) -> str | None:
    """Returns why torch.compile cannot run there, and the remedy; None when it can."""
    if on_gpu and not is_installed("triton"):
        return f"the package 'triton' is not installed. {INSTALL}"
    compiler = os.environ.get("CXX", "g++")
    if not on_gpu and shutil.which(compiler) is None:
        return (
            f"torch compiles for the CPU with a C++ compiler, and there is no {compiler!r}. Install one, name it in "
            "the environment variable CXX, or set the key to auto or off."
        )
    return None
