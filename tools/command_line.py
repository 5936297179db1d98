"""Arguments that several tools take, and the progress bar that they show."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron.config.local_path import url_remedy
from megatron.errors import ConfigError

if TYPE_CHECKING:
    from megatron.config.command_line import CommandLine
    from megatron.config.load_config import LoadedConfig
    from megatron.config.sections.run_config import RunConfig


def tool_parser(description: str | None) -> argparse.ArgumentParser:
    """Builds a parser whose help shows the docstring of a tool as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_config_file(parser: argparse._ActionsContainer, meaning: str, *, required: bool = False) -> None:
    """Adds `--config_file a.yml b.yml key=value`: YAML files and overrides in one list, which `load_words` reads."""
    parser.add_argument("--config_file", nargs="+", required=required, metavar="a.yml key=value", help=meaning)


def add_config_source(parser: argparse.ArgumentParser, source: str) -> None:
    """Adds `--config_file`, which describes the model of a `source`, and `--write-config`, which derives it from there.

    One of them must be given; `read_config_source` reads either.
    """
    group = parser.add_mutually_exclusive_group(required=True)
    add_config_file(group, f"YAML files that describe the {source}'s model")
    group.add_argument(
        "--write-config",
        nargs="+",
        metavar="new.yml key=value",
        help=f"YAML file to make from the {source}, and to use",
    )


def read_config_source(
    args: argparse.Namespace, source: str, write_config: Callable[[Path, Sequence[str]], None]
) -> RunConfig:
    """Reads the configuration that the arguments name; with --write-config, `write_config` writes it first.

    It is given the path and the words after it, `key=value`, which then override what it has written.
    """
    from megatron.config.load_config import load_words

    if args.write_config is not None:
        if remedy := url_remedy(args.write_config[0]):
            raise ConfigError(f"--write-config {args.write_config[0]}: expected a path on this machine{remedy}.")
        path = Path(args.write_config[0])
        write_config(path, args.write_config[1:])
        print(f"{path}: the {source}'s model as a configuration")
    return load_words(args.config_file or args.write_config).run


def planned_batch_size(loaded: LoadedConfig, command: CommandLine) -> int:
    """Returns the samples per step. --world-size matters only where the configuration leaves it to the ranks.

    Without it, there is one model replica.
    """
    from megatron.config.batch_triangle import implied_data_parallel_size, resolve_batch

    if command.world_size is not None:
        return loaded.batch(command.world_size).global_batch_size
    training = loaded.run.training
    replicas = implied_data_parallel_size(training) or 1
    return training.train_batch_size or resolve_batch(training, replicas, loaded.origins).global_batch_size


def positive(text: str) -> int:
    """Converts an argument that counts something. Raises ArgumentTypeError unless it is a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, not {text!r}")
    return int(text)


def stay_on_cpu() -> None:
    """Keeps DeepSpeed on the CPU, and from writing to standard output that it looks for an accelerator."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def progress_bar(*, transient: bool = False) -> Progress:
    """Builds a progress bar on standard error; a `transient` one disappears at the end."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=transient,
    )
