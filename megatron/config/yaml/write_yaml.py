"""A configuration that an import makes of what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron.errors import ConfigError


def write_new_yaml(path: Path, header: str, keys: Mapping[str, Any]) -> None:
    """Write `header` and `keys` to `path`, which --write-config names. Raises ConfigError when it exists, or cannot be
    written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(header + yaml.safe_dump(dict(keys), sort_keys=False))
    except FileExistsError as error:
        raise ConfigError(f"--write-config {path}: it exists. Give it as --config_file, or name another.") from error
    except OSError as error:
        raise ConfigError(f"--write-config {path}: cannot be written ({error.strerror}).") from error
