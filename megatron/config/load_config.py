"""Loads YAML files and overrides into a checked configuration that remembers where every value came from."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.config.batch_triangle import data_parallel_size, resolve_batch
from megatron.config.build_config import build, origins
from megatron.config.checks.grow import growth_comes_too_late
from megatron.config.checks.layout import parallel_sizes
from megatron.config.local_path import url_remedy
from megatron.config.merge_files import gather, split_words
from megatron.config.neox.translate import translate
from megatron.config.run_yaml import GivenConfiguration, is_kept, run_folder_at
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import BatchConfig
from megatron.config.yaml.problems import Given, Origin, report
from megatron.errors import ConfigError


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration that passed every check which needs no hardware."""

    run: RunConfig
    origins: Mapping[str, Origin]
    """Where each value came from, by dotted path of the sections."""
    sources: tuple[Path, ...]
    """The YAML files."""
    warnings: tuple[str, ...]
    """Overrides that others take the place of, values read as others, and keys without effect: those that the user
    might count on with the reason, the others by name."""
    inert: tuple[str, ...]
    """All keys without effect, and why."""
    given: GivenConfiguration
    """What was given, for the run to keep."""

    @property
    def name(self) -> str:
        """Returns the name by which figures call the run."""
        return self.given.name

    @property
    def run_folder(self) -> Path:
        """Returns the folder of the run's metrics: `log_dir`, else `save`, else runs/<name of the first YAML>."""
        return Path(self.run.monitor.log_dir or self.run.checkpoint.save or f"runs/{self.name}")

    def batch(self, world_size: int) -> BatchConfig:
        """Resolves the batch on `world_size` ranks.

        Raises ConfigError when it or the parallel sizes do not divide, or when the run ends before it grows.
        """
        try:
            data = data_parallel_size(self.run.parallel, world_size)
        except ConfigError as error:
            raise ConfigError(f"{error} {_sizes(self.run, world_size)}") from error
        batch = resolve_batch(self.run.training, data, self.origins)
        late = growth_comes_too_late(self.run, batch.global_batch_size)
        if late is not None:
            raise ConfigError(f"{self.origins['grow.at_tokens']} grow.at_tokens: {late}")
        return batch

    def replicas(self, world_size: int) -> int:
        """Counts the copies of a trained model that `world_size` ranks hold, which have one pipeline stage always.

        Raises ConfigError when model_parallel_size does not divide the ranks.
        """
        return data_parallel_size(self.run.parallel.model_copy(update={"pipe_parallel_size": 1}), world_size)


def _sizes(run: RunConfig, world_size: int) -> str:
    """Names sizes of the parallel groups for so many ranks, in a sentence."""
    pairs = sorted(parallel_sizes(run, world_size), key=lambda pair: (pair[0] * pair[1], pair))
    listed = ", ".join(f"{tensor} x {stages}" for tensor, stages in pairs[:_MOST_SIZES])
    more = " and larger ones" if len(pairs) > _MOST_SIZES else ""
    return f"{world_size} ranks and this model divide by {listed}{more}; --plan names the fastest."


_MOST_SIZES = 8


def load_words(words: Sequence[str]) -> LoadedConfig:
    """Loads the configuration of `a.yml b.yml key=value`, given as one list, and prints its warnings."""
    names, overrides = split_words(words)
    for name in names:
        if remedy := url_remedy(name):
            raise ConfigError(f"{name}: expected a YAML file on this machine{remedy}.")
    files, implied = files_of([Path(name) for name in names], overrides)
    loaded = load_config(files, [*implied, *overrides])
    print_warnings(loaded)
    return loaded


def files_of(names: Sequence[Path], overrides: Sequence[str], *, trains: bool = False) -> tuple[list[Path], list[str]]:
    """Returns the YAML files of a command that may name the folder of a run, and the overrides that this implies.

    `trains` says that the command goes on with the run; any other reads its checkpoints. Raises ConfigError for a
    folder without a configuration, and for a folder beside other names.
    """
    folders = [run_folder_at(name) for name in names]
    if not any(folders):
        return list(names), []
    folder = folders[0]
    if folder is None or len(names) > 1:
        raise ConfigError(
            f"{' '.join(map(str, names))}: a run's folder stands alone, as it keeps a whole configuration; give what "
            "is to differ as key=value."
        )
    return [folder.file], folder.overrides(trains=trains, given=overrides)


def print_warnings(loaded: LoadedConfig) -> None:
    """Prints the warnings of a configuration, on the first rank of those that read it."""
    if loaded.warnings and os.environ.get("RANK", "0") == "0":
        print("\n".join(loaded.warnings), file=sys.stderr)


def load_config(files: Sequence[Path], overrides: Sequence[str] = ()) -> LoadedConfig:
    """Reads, merges, translates and checks YAML files and `key=value` overrides.

    Raises ConfigError with everything that is wrong. What cannot be read or stands twice is reported before the rest,
    which would be misleading without it.
    """
    sources = tuple(Path(file) for file in files)
    gathered = gather(sources, overrides)
    if gathered.problems:
        raise ConfigError(report(gathered.problems, sources))
    return load_given(gathered.given, sources, gathered.notices, overrides)


def load_given(
    given: Mapping[str, Given], sources: Sequence[Path], notices: Sequence[str] = (), overrides: Sequence[str] = ()
) -> LoadedConfig:
    """Translates and checks keys that have been gathered from `sources` and `overrides`, with `notices` of that.

    Raises ConfigError with everything that is wrong.
    """
    translation = translate(given)
    run, wrong = build(translation.settings, translation.refused)
    problems = translation.problems + wrong
    if problems or run is None:
        raise ConfigError(report(problems, sources))
    return LoadedConfig(
        run=run,
        origins=origins(run, translation.settings),
        sources=tuple(sources),
        warnings=(*notices, *translation.warnings, *_named(translation.ignored)),
        inert=tuple(translation.inert),
        given=GivenConfiguration(_name(sources), given, (*map(str, sources), *overrides)),
    )


def _name(sources: Sequence[Path]) -> str:
    """Returns the name of the first YAML, which says what is trained; those after it say where, and on what."""
    first = sources[0]
    return first.resolve().parent.name if is_kept(first) else first.stem


def _named(ignored: Sequence[str]) -> list[str]:
    names = ", ".join(ignored)
    return [f"keys without effect here: {names} (--print-effective-config says why)"] if ignored else []
