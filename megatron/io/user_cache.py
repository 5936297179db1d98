"""The folder in which this project keeps, for a user, what can be made again."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_FOLDER = "megatron-tokenformer"


def user_cache() -> Path | None:
    """Returns the folder, which need not exist; None where there is no place for it."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # The specification of XDG_CACHE_HOME has relative paths ignored.
        caches = chosen if chosen.is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # there is no home folder
        return None
    return caches / CACHE_FOLDER
