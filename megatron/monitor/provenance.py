"""Provenance of a result: the code and the machine that made it."""

from __future__ import annotations

import subprocess
from pathlib import Path


def device_name() -> str:
    """Returns the accelerator's name as torch reports it, or "cpu"."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def git_commit() -> str | None:
    """Returns the commit of the checkout that this file belongs to; None outside one, or without git."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
