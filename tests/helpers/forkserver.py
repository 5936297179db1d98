"""Processes forked from one that has imported torch and DeepSpeed.

A process that starts afresh spends seconds on imports; a fork spends none of them, and is as separate as any other:
it can be killed, and nothing of DeepSpeed's outlives it.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tools" / "start"))),
}
"""Must be set when a process is started, for the first start is also that of the process that is forked."""
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["tests.helpers.preloaded"]
CONTEXT.set_forkserver_preload(PRELOADED)


def preload_evaluation() -> None:
    """Makes the process that others are forked from import lm-eval too, which takes seconds."""
    CONTEXT.set_forkserver_preload(["tests.helpers.preloaded_evaluation", *PRELOADED])
