"""Grows a TokenFormer by parameter tokens: a larger model from a trained checkpoint, optimizer state included.

    python tools/ckpts/grow.py --input_dir runs/124M --config_file configs/tokenformer/150M.yml ffn_slot_num=4288 \\
        ffn_scale_base=2304 --operator zero_key --output_dir runs/grown [--ranks 16]

The configuration describes the larger model; `*_scale_base` pins the scale of the scores to the old token counts, so
that the model computes at first what it did before. Any layout in, the configured one out. Train on with
`auto_resume: true` and `save` naming the output. It needs no GPU and no ranks; a layer is in memory at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_tokenformer import run_tool

from megatron.config.model_size import count_parameters
from megatron.config.sections.growth import GrowthRules
from megatron.registry import variant_names
from tools.ckpts.rewriting import add_rewriting, read_rewriting
from tools.command_line import stay_on_cpu, tool_parser


def main(argv: Sequence[str]) -> int:
    """Grows the checkpoint to the model of the configuration, then prints what was written."""
    args = parse_args(argv)
    stay_on_cpu()
    job = read_rewriting(args)
    from megatron.growth.grow_checkpoint import grow_checkpoint

    rules = GrowthRules(operator=args.operator)
    path = grow_checkpoint(job.source, job.config, rules, job.sizes, args.output_dir)
    rows = job.source.state.padded_vocab_size
    before, after = (count_parameters(model, rows) for model in (job.source.config.model, job.config.model))
    print(f"{path}: {job.source.path} grown by {args.operator} from {before:,} to {after:,} parameters")
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = tool_parser(__doc__)
    add_rewriting(parser, "YAML files of the larger model")
    parser.add_argument(
        "--operator",
        choices=variant_names("megatron.growth.operators"),
        default="zero_key",
        help="way to grow (zero_key)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_tool(main)
