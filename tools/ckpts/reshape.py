"""Rewrite a checkpoint, optimizer state included, for the parallel sizes and the precision of a configuration.

    python tools/ckpts/reshape.py --input_dir runs/150M/global_step1000 --config_file configs/tokenformer/150M.yml \\
        model_parallel_size=2 --output_dir runs/150M-tp2 [--ranks 16]

Training converts by itself what another layout wrote. This is for a checkpoint that is to be kept or moved in one
layout, or that lies where training may not write. It needs no GPU and no ranks, and the memory of a pipeline stage.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_tokenformer import run_tool

from megatron.checkpointing.store.find_checkpoint import newest_checkpoint
from megatron.config.batch_triangle import data_parallel_size
from megatron.config.load_config import load_words
from megatron.errors import CheckpointError


def main(argv: Sequence[str]) -> int:
    """Reshape as asked, then say what was written."""
    args = parse_args(argv)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed writes to standard output that it looks for one
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("megatron").setLevel(logging.INFO)
    run = load_words(args.config_file).run
    sizes = run.parallel
    ranks = args.ranks or run.launch.num_gpus or sizes.model_parallel_size * sizes.pipe_parallel_size
    data_size = data_parallel_size(sizes, ranks)
    from megatron.checkpointing.convert.reshape import reshape

    source = newest_checkpoint(args.input_dir, run.checkpoint.verify_checkpoint)
    if args.output_dir.resolve() in (source.path.resolve().parent, source.path.resolve()):
        raise CheckpointError(f"{args.output_dir} is where the checkpoint lies. Name another folder.")
    path = reshape(source, run, data_size, args.output_dir)
    print(
        f"{path}: {source.path} for {ranks} ranks, model_parallel_size {sizes.model_parallel_size}, "
        f"pipe_parallel_size {sizes.pipe_parallel_size}, data-parallel size {data_size}, {run.training.precision.dtype}"
    )
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_dir", type=Path, required=True, help="a global_stepN folder, or a run's folder")
    parser.add_argument(
        "--config_file", nargs="+", required=True, metavar="a.yml key=value", help="YAML files of the run to come"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder that the global_stepN folder goes to")
    parser.add_argument(
        "--ranks", type=int, help="ranks of the run to come; num_gpus, or one model's worth, when not given"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_tool(main)
