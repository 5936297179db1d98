"""An object that runs code when it is unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Bomb:
    """Makes the file `trace` when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)
