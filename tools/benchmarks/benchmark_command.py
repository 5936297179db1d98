"""Options and report file that every benchmark has."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.config.command_line import parse_command_line
from megatron.config.load_config import load_config
from megatron.config.local_path import local_path
from megatron.config.sections.run_config import RunConfig
from tools.command_line import positive


def benchmark_parser(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Builds a parser of the options; it leaves YAML files and overrides to `parse_command_line`.

    `rounds` is the default of --rounds.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s a.yml [b.yml ...] [key=value ...] [options]",
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=positive, default=rounds, help=f"timed rounds of each (default: {rounds})")
    parser.add_argument("--vocab-size", type=positive, help="ids of the vocabulary, in place of the tokenizer's")
    parser.add_argument("--output", type=local_path, help="JSON file to write")
    return parser


def run_benchmark(
    args: argparse.Namespace,
    words: Sequence[str],
    benchmark: Callable[[RunConfig, argparse.Namespace], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> int:
    """Measures the configuration of `words`, prints the table, and writes the JSON file; returns the exit code."""
    command = parse_command_line(words)
    report = {"config": list(words)} | benchmark(load_config(command.files, command.overrides).run, args)
    print(table(report))
    write_report(report, args.output)
    return 0


def write_report(report: Mapping[str, Any], output: Path | None) -> None:
    """Writes the JSON file that was asked for, if any, and prints its path."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
        print(output)
