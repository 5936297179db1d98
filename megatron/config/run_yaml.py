"""run.yml: the configuration that a run keeps in its folder, so that a command can name the folder alone.

    python deepy.py generate.py runs/a prompt="def main"
    python deepy.py train.py runs/a train_iters=+1000

It holds the keys as they were given, so that a later version reads them as it would read the user's own files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.config.merge_files import OVERRIDE
from megatron.config.neox.keys.table import is_dictionary
from megatron.config.yaml.problems import Given, YamlValue
from megatron.config.yaml.yaml_files import dump_yaml, read_yaml
from megatron.errors import ConfigError, EnvironmentSetupError, os_errors_as
from megatron.io.durable import replace_durably

RUN_YAML = "run.yml"
OPENING = "# The configuration of this run, as its last start has read it: "
"""Start of every run.yml; a file of that name that begins otherwise is somebody's own, and stays."""

CHECKPOINTS = ("latest", "global_step*")
"""Names in a folder that holds checkpoints."""


@dataclass(frozen=True)
class GivenConfiguration:
    """A configuration as it was given."""

    name: str = ""
    """Name by which figures are to call the run."""
    keys: Mapping[str, Given] = field(default_factory=dict)
    """All keys that were given, by flat name."""
    words: Sequence[str] = ()
    """The files and overrides that gave them."""

    def text(self) -> str:
        """Writes the keys as the content of a run.yml, with the words that gave them.

        There are no secrets among them: no key takes one, and a URL that holds one is refused.
        """
        tree: dict[str, Any] = {}
        for key, item in self.keys.items():
            *around, name = _nested(key)
            block = tree
            for part in around:
                block = block.setdefault(part, {})
            block[name] = item.value
        return (
            f"{OPENING}{json.dumps(' '.join(self.words), ensure_ascii=False)[1:-1]}\n"
            f"# A command takes this folder in place of YAML files; key=value after it overrides {RUN_YAML}.\n"
            f"{dump_yaml(tree)}"
        )


NOTHING_GIVEN = GivenConfiguration()
"""Configuration of a run that keeps none."""


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, named in place of YAML files."""

    path: Path

    @property
    def file(self) -> Path:
        """Returns its run.yml."""
        return self.path / RUN_YAML

    def overrides(self, *, trains: bool, given: Iterable[str]) -> list[str]:
        """Returns overrides that let a command go on from this folder, without the keys of `given` ones.

        A run that `trains` continues here, also where the folder has moved; any other command loads its checkpoints,
        the newest one.
        """
        saves = self._value("save")
        holds_checkpoints = any(True for pattern in CHECKPOINTS for _ in self.path.glob(pattern))
        folder = self.path if holds_checkpoints or not isinstance(saves, str) else Path(saves)
        if not trains:
            implied: dict[str, str] = {"load": _quoted(folder), "iteration": "null"}
        elif isinstance(saves, str) and Path(saves).resolve() == folder.resolve():
            implied = {"auto_resume": "true"}
        else:
            implied = {"auto_resume": "true", "save": _quoted(folder)}
        named = {match["key"].replace("-", "_") for match in map(OVERRIDE.fullmatch, given) if match is not None}
        return [f"{key}={value}" for key, value in implied.items() if key not in named]

    def _value(self, key: str) -> YamlValue:
        entries, problems = read_yaml(self.file)
        return None if problems or key not in entries else entries[key].plain()


def _quoted(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)


def run_folder_at(path: Path) -> RunFolder | None:
    """Returns the run whose folder is named in place of a YAML file; None where `path` is no folder.

    Raises ConfigError for a folder without run.yml.
    """
    if not path.is_dir():
        return None
    if not (path / RUN_YAML).is_file():
        raise ConfigError(
            f"{path}: expected a YAML file, or the folder of a run, in which training keeps {RUN_YAML}. A run of an "
            "older version has none: name its YAML files."
        )
    return RunFolder(path)


def _nested(key: str) -> list[str]:
    """Takes a flat key apart, as far as its parts are dictionaries."""
    parts = key.split(".")
    for length in range(1, len(parts)):
        if not is_dictionary(".".join(parts[:length])):
            return [*parts[: length - 1], ".".join(parts[length - 1 :])]
    return parts


def is_kept(file: Path) -> bool:
    """Tells whether a file that can be read is a run.yml as training writes it."""
    if file.name != RUN_YAML:
        return False
    with file.open("rb") as stream:
        return stream.read(len(OPENING)) == OPENING.encode()


def write_run_yaml(text: str, folder: Path) -> bool:
    """Writes run.yml into a run's folder, whole or not at all; returns False where somebody's own file stays.

    Raises EnvironmentSetupError where it cannot be written.
    """
    file = folder / RUN_YAML
    with os_errors_as(EnvironmentSetupError, str(file)):
        if file.is_file() and not is_kept(file):
            return False
        replace_durably(file, text)
    return True
