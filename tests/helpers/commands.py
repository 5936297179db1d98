"""Commands as users type them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.forkserver import ROOT


def run_command(arguments: Sequence[str], folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python SCRIPT ARGUMENTS` without a GPU: a script of the project, in its root folder or in another one."""
    script, *words = map(str, arguments)
    return subprocess.run(
        [sys.executable, script if folder == ROOT else str(ROOT / script), *words],
        cwd=folder,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
