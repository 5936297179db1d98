"""Memory that a rank holds beyond what it had at some moment."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


class HeldMemory:
    """Measures, from its making on, the most that this process's tensors hold at a time.

    On a GPU torch's allocator knows. On a CPU it is resident memory less what the process had before, imports and all.
    """

    def __init__(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._before = 0.0
            return
        # Where the system does not forget a peak, it is that of the imports, which is no less.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _status_bytes("VmRSS")

    def peak(self) -> float:
        """Returns the most that was held at a time [bytes]; 0 where the system does not say."""
        if torch.cuda.is_available():
            return float(torch.cuda.max_memory_allocated())
        return _status_bytes("VmHWM") - self._before


def _status_bytes(name: str) -> float:
    if not STATUS.exists():
        return 0.0
    (found,) = (line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return float(found) * 1024
