"""Commands as users type them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from tests.helpers.forkserver import ROOT


def run_command(arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` in the project's root folder, without a GPU."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
