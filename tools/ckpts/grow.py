"""Grow a TokenFormer by parameter tokens: a larger model from a trained checkpoint, optimizer state included.

    python tools/ckpts/grow.py --input_dir runs/124M --config_file configs/tokenformer/150M.yml ffn_slot_num=4288 \\
        ffn_scale_base=2304 --operator zero_key --output_dir runs/grown [--ranks 16]

The configuration describes the larger model; `*_scale_base` pins the scale of the scores to the old token counts, so
that the model computes at first what it did before. Any layout in, the configured one out. Train on with
`auto_resume: true` and `save` naming the output. It needs no GPU and no ranks; a layer is in memory at a time.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_tokenformer import run_tool

from megatron.checkpointing.store.find_checkpoint import newest_checkpoint
from megatron.config.batch_triangle import data_parallel_size
from megatron.config.load_config import load_words
from megatron.config.model_size import count_parameters
from megatron.errors import CheckpointError
from megatron.registry import variant_names


def main(argv: Sequence[str]) -> int:
    """Grows as asked, then says what was written."""
    args = parse_args(argv)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed writes to standard output that it looks for one
    run = load_words(args.config_file).run
    sizes = run.parallel
    ranks = args.ranks or run.launch.num_gpus or sizes.model_parallel_size * sizes.pipe_parallel_size
    data_size = data_parallel_size(sizes, ranks)
    from megatron.checkpointing.states.parameter_layout import ParallelSizes
    from megatron.growth.grow_checkpoint import grow_checkpoint

    source = newest_checkpoint(args.input_dir, run.checkpoint.verify_checkpoint)
    if args.output_dir.resolve() in (source.path.resolve().parent, source.path.resolve()):
        raise CheckpointError(f"{args.output_dir} is where the checkpoint lies. Name another folder.")
    target = ParallelSizes(sizes.model_parallel_size, sizes.pipe_parallel_size, data_size)
    path = grow_checkpoint(source, run, args.operator, target, args.output_dir)
    rows = source.state.padded_vocab_size
    before, after = (count_parameters(model, rows) for model in (source.config.model, run.model))
    print(f"{path}: {source.path} grown by {args.operator} from {before:,} to {after:,} parameters")
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_dir", type=Path, required=True, help="a global_stepN folder, or a run's folder")
    parser.add_argument(
        "--config_file", nargs="+", required=True, metavar="a.yml key=value", help="YAML files of the larger model"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder that the global_stepN folder goes to")
    parser.add_argument("--operator", choices=variant_names("megatron.growth.operators"), default="zero_key")
    parser.add_argument(
        "--ranks", type=int, help="ranks of the run to come; num_gpus, or one model's worth, when not given"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_tool(main)
