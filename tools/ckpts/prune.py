"""Prunes the parameter tokens of a TokenFormer's checkpoint: keeps those that matter most on real text.

    python tools/ckpts/prune.py --input_dir runs/150M --share 0.5 --text book.txt --output_dir runs/pruned
    python tools/ckpts/prune.py --input_dir runs/150M --ffn 2304 --measure gradient \\
        --data_path data/pile/val_text_document --output_dir runs/pruned
    python tools/ckpts/prune.py --input_dir runs/150M --share 1 --text book.txt --output_dir runs/ordered

It measures every token of every Pattention (--measure), orders them by importance, each Pattention its own, and keeps
as many of the best as are asked for, the same number in every layer. Masters and moments move with their rows. With
--share 1 it only orders them: the function stays, and a share of the result is its most important part.

The scale of the scores stays that of the whole model (`*_scale_base`). The loss is shown before and after, under that
scale and under the one that the smaller counts would give, on sequences that importance was not measured on. Train on
for a short while with what it prints last, and validate.py shows the loss then. It needs no GPU and no ranks, and
memory for the whole model in float32.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace

from megatron_tokenformer import run_tool

from megatron.errors import DataError
from tools.ckpts.extract import add_sizes, keys_of, parameters, sizes_of, smaller_model
from tools.ckpts.rewriting import add_measured_tokens, add_rewriting, read_rewriting
from tools.command_line import positive, stay_on_cpu, tool_parser

HELD_OUT = 4
"""Sequences that losses are measured on [sequences]."""


def main(argv: Sequence[str]) -> int:
    """Drops the least important tokens, then prints losses, what was written, and how to train it."""
    args = parse_args(argv)
    stay_on_cpu()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("megatron").setLevel(logging.INFO)
    job = read_rewriting(args)
    smaller = smaller_model(job.source.config.model, args)
    import torch

    from megatron.growth.shrinking.prune_tokens import by_importance, token_importance, with_recomputed_scale
    from megatron.growth.shrinking.write_smaller import unchanged, write_smaller
    from tools.ckpts.measured_tokens import measured_tokens

    tokens = measured_tokens(args.data_path, args.text, job.config, job.source.vocab, HELD_OUT + args.sequences)
    if len(tokens) <= HELD_OUT:
        raise DataError(
            f"the text has {len(tokens)} sequences of {tokens.shape[1]} tokens; the first {HELD_OUT} show the loss, "
            "and importance is measured on those after them. Name a longer text."
        )
    held_out, measured = tokens[:HELD_OUT], tokens[HELD_OUT:]
    importance = token_importance(job.source, args.measure, torch.split(measured, HELD_OUT))
    pruned = by_importance(job.source, importance, smaller)
    recomputed = replace(pruned, model=with_recomputed_scale(smaller))
    print(
        f"On {held_out.numel():,} tokens the loss goes from {unchanged(job.source).loss(held_out):.4f} to "
        f"{pruned.loss(held_out):.4f} under the scale of the whole model, and to {recomputed.loss(held_out):.4f} "
        "under a recomputed one. The former is written.",
        flush=True,
    )
    path = write_smaller(pruned, job.config, job.sizes, args.output_dir, "prune.py")
    change = parameters(job.source.config.model, smaller, job.source.state.padded_vocab_size)
    print(f"{path}: {sizes_of(smaller)} of {job.source.path} by {args.measure}, {change}")
    print(f"Train on with: {' '.join(keys_of(smaller))} save={args.output_dir} auto_resume=true")
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = tool_parser(__doc__)
    add_rewriting(parser, "YAML files of the run to come", config_required=False)
    add_sizes(parser)
    importance = parser.add_argument_group("importance of a token")
    importance.add_argument(
        "--measure",
        choices=("activation", "gradient"),
        default="activation",
        help="mean of |weight| times the length of the value; or of |gradient times weight| (activation)",
    )
    importance.add_argument("--sequences", type=positive, default=64, help="sequences that it is measured on (64)")
    add_measured_tokens(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_tool(main)
