"""Arguments of the tools that rewrite a run's checkpoint for a run to come: from where, for which ranks, to where."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.batch_triangle import data_parallel_size
from megatron.config.load_config import load_words
from megatron.config.sections.run_config import RunConfig
from megatron.errors import CheckpointError
from tools.command_line import add_config_file, positive

if TYPE_CHECKING:
    from megatron.checkpointing.states.parameter_layout import ParallelSizes
    from megatron.checkpointing.store.checkpoint import Checkpoint


@dataclass(frozen=True)
class Rewriting:
    """A checkpoint, and the run to write it for."""

    source: Checkpoint
    config: RunConfig
    """Of the run to come."""
    ranks: int
    """Ranks of the run to come."""
    sizes: ParallelSizes
    """Those ranks by parallel dimension."""


def add_rewriting(parser: argparse.ArgumentParser, config: str) -> None:
    """Adds --input_dir, --config_file with the meaning `config`, --output_dir and --ranks."""
    parser.add_argument("--input_dir", type=Path, required=True, help="a global_stepN folder, or a run's folder")
    add_config_file(parser, config, required=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder that the global_stepN folder goes to")
    parser.add_argument(
        "--ranks", type=positive, help="ranks of the run to come; num_gpus, or one model's worth, when not given"
    )


def read_rewriting(args: argparse.Namespace) -> Rewriting:
    """Reads the configuration and finds the checkpoint that the arguments name.

    Raises ConfigError when the ranks do not divide, and CheckpointError without a whole checkpoint, or when the output
    would replace it.
    """
    from megatron.checkpointing.states.parameter_layout import ParallelSizes
    from megatron.checkpointing.store.find_checkpoint import newest_checkpoint

    config = load_words(args.config_file).run
    parallel = config.parallel
    ranks = args.ranks or config.launch.num_gpus or parallel.model_parallel_size * parallel.pipe_parallel_size
    data_size = data_parallel_size(parallel, ranks)
    source = newest_checkpoint(args.input_dir, config.checkpoint.verify_checkpoint)
    if args.output_dir.resolve() in (source.path.resolve().parent, source.path.resolve()):
        raise CheckpointError(f"{args.output_dir} is where the checkpoint lies. Name another folder.")
    sizes = ParallelSizes(parallel.model_parallel_size, parallel.pipe_parallel_size, data_size)
    return Rewriting(source, config, ranks, sizes)
