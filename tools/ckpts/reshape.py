"""Rewrites a checkpoint, optimizer state included, for the parallel sizes and the precision of a configuration.

    python tools/ckpts/reshape.py --input_dir runs/150M/global_step1000 --config_file configs/tokenformer/150M.yml \\
        model_parallel_size=2 --output_dir runs/150M-tp2 [--ranks 16]

Training converts by itself what another layout wrote. This is for a checkpoint that is to be kept or moved in one
layout, or that lies where training may not write. It needs no GPU and no ranks, and the memory of a pipeline stage.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from megatron_tokenformer import run_tool

from tools.ckpts.rewriting import add_rewriting, read_rewriting
from tools.command_line import stay_on_cpu, tool_parser


def main(argv: Sequence[str]) -> int:
    """Rewrites the checkpoint for the ranks of the configuration, then prints what was written."""
    args = parse_args(argv)
    stay_on_cpu()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("megatron").setLevel(logging.INFO)
    job = read_rewriting(args)
    from megatron.checkpointing.convert.reshape import reshape

    path = reshape(job.source, job.config, job.sizes.data, args.output_dir)
    print(
        f"{path}: {job.source.path} for {job.ranks} ranks, model_parallel_size {job.sizes.tensor}, "
        f"pipe_parallel_size {job.sizes.pipe}, data-parallel size {job.sizes.data}, "
        f"{job.config.training.precision.dtype}"
    )
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = tool_parser(__doc__)
    add_rewriting(parser, "YAML files of the run to come")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_tool(main)
