"""Arguments of the tools that rewrite a run's checkpoint for a run to come: from where, for which ranks, to where."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.config.batch_triangle import data_parallel_size
from megatron.config.load_config import load_words
from megatron.config.local_path import local_path
from megatron.config.sections.checkpoint import CheckpointConfig
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


def add_rewriting(
    parser: argparse.ArgumentParser,
    config: str,
    *,
    config_required: bool = True,
    source: str = "a global_stepN folder, or a run's folder",
) -> None:
    """Adds --input_dir with the meaning `source`, --config_file with that of `config`, --output_dir and --ranks."""
    parser.add_argument("--input_dir", type=local_path, required=True, help=source)
    add_config_file(parser, config, required=config_required)
    parser.add_argument(
        "--output_dir", type=local_path, required=True, help="folder that the global_stepN folder goes to"
    )
    parser.add_argument(
        "--ranks", type=positive, help="ranks of the run to come; num_gpus, or one model's worth, when not given"
    )


def add_measured_tokens(parser: argparse.ArgumentParser) -> None:
    """Adds --data_path and --text, of which one may be given."""
    tokens = parser.add_argument_group("tokens to measure on").add_mutually_exclusive_group()
    tokens.add_argument(
        "--data_path", type=local_path, help="prefix of a tokenized dataset (that of the configuration)"
    )
    tokens.add_argument("--text", type=local_path, help="text file, for the configured tokenizer")


def read_rewriting(args: argparse.Namespace) -> Rewriting:
    """Reads the configuration and finds the checkpoint that the arguments name.

    Without a configuration, that of the checkpoint holds, and its ranks unless --ranks says others. Raises ConfigError
    when the ranks do not divide, and CheckpointError without a whole checkpoint, or when the output would replace it.
    """
    from megatron.checkpointing.store.find_checkpoint import newest_checkpoint

    configured = None if args.config_file is None else load_words(args.config_file).run
    verification = CheckpointConfig() if configured is None else configured.checkpoint
    source = newest_checkpoint(args.input_dir, verification.verify_checkpoint)
    config = configured or source.config
    parallel = config.parallel
    model_size = parallel.model_parallel_size * parallel.pipe_parallel_size
    same_ranks = model_size * source.state.data_parallel_size if configured is None else None
    ranks = args.ranks or same_ranks or config.launch.num_gpus or model_size
    if args.output_dir.resolve() in (source.path.resolve().parent, source.path.resolve()):
        raise CheckpointError(f"{args.output_dir} is where the checkpoint lies. Name another folder.")
    return Rewriting(source, config, ranks, parallel_sizes(config, ranks))


def parallel_sizes(config: RunConfig, ranks: int | None) -> ParallelSizes:
    """Returns the ranks of a run by parallel dimension; num_gpus, or one model's worth, when `ranks` is None.

    Raises ConfigError when they do not divide.
    """
    from megatron.checkpointing.states.parameter_layout import ParallelSizes

    parallel = config.parallel
    ranks = ranks or config.launch.num_gpus or parallel.model_parallel_size * parallel.pipe_parallel_size
    data_size = data_parallel_size(parallel, ranks)
    return ParallelSizes(parallel.model_parallel_size, parallel.pipe_parallel_size, data_size)
