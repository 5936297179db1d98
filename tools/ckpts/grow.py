"""Grows a checkpoint: a larger model from a trained one, optimizer state included.

    python tools/ckpts/grow.py --input_dir runs/124M --factor 2 --output_dir runs/grown
    python tools/ckpts/grow.py --input_dir runs/124M --qkv 2140 --proj 2140 --ffn 8560 --operator zero_key \\
        --moments reset_new --output_dir runs/grown [--config_file run.yml model_parallel_size=2] [--ranks 16]
    python tools/ckpts/grow.py --input_dir runs/124M --num_layers 24 --operator stack --output_dir runs/deeper
    python tools/ckpts/grow.py --input_dir runs/124M --config_file configs/growth/354M.yml --output_dir runs/grown

The larger model has the sizes that are asked for, or those of the configuration; its other keys, such as those of
the layout, hold in either case, and without one the checkpoint's own hold. Sizes pin the scale of the scores as the
operator needs it; a configuration must say it (`*_scale_base`). Any layout in, the configured one out.

Before it writes, it computes both models on tokens of the configured dataset, or of --data_path or --text, and says how
far logits and loss have moved. Operators that promise to preserve the function are held to it: above 1e-5 of the
largest logit nothing is written. Train on with `auto_resume: true` and `save` naming the output. It needs no GPU and no
ranks; a layer is in memory at a time.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_tokenformer import run_tool

from megatron.config.model_size import count_parameters
from megatron.config.sections.growth import GrowthRules
from megatron.config.sections.model import ModelConfig
from tools.ckpts.rewriting import Rewriting, add_measured_tokens, add_rewriting, read_rewriting
from tools.command_line import positive, stay_on_cpu, tool_parser
from tools.section_flags import add_section_flags, read_section_flags

if TYPE_CHECKING:
    from megatron.growth.growth_operator import Growth

SIZES = ("qkv", "proj", "ffn", "num_layers", "factor")


def main(argv: Sequence[str]) -> int:
    """Grows the checkpoint, then prints what was written, and how to train it."""
    args = parse_args(argv)
    stay_on_cpu()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("megatron").setLevel(logging.INFO)
    rules = read_section_flags(args, GrowthRules)
    job = with_sizes(read_rewriting(args), args, rules)
    from megatron.growth.grow_checkpoint import grow_checkpoint, plan_growth
    from megatron.growth.growth_table import growth_table
    from megatron.growth.measure_change import measure_change, require_promised
    from tools.ckpts.measured_tokens import measured_tokens

    growth = plan_growth(job.source, job.config, rules)
    print("\n".join(growth_table(growth)), flush=True)
    tokens = measured_tokens(args.data_path, args.text, job.config, growth.vocab)
    change = measure_change(job.source, growth, tokens)
    print(
        f"On {tokens.numel():,} tokens, logits change by at most {change.logits:.1e} of the largest, and the loss from "
        f"{change.loss_before:.4f} to {change.loss_after:.4f}.",
        flush=True,
    )
    require_promised(change, growth)
    path = grow_checkpoint(job.source, job.config, rules, job.sizes, args.output_dir)
    rows = job.source.state.padded_vocab_size
    before, after = (count_parameters(model, rows) for model in (growth.before, growth.after))
    print(f"{path}: {job.source.path} grown by {rules.operator} from {before:,} to {after:,} parameters")
    print(f"Train on with: {' '.join(keys_of(growth))} save={args.output_dir} auto_resume=true")
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = tool_parser(__doc__)
    add_rewriting(parser, "YAML files of the run to come", config_required=False)
    sizes = parser.add_argument_group("sizes of the larger model, where the configuration does not say them")
    for name, what in (("qkv", "query, key and value"), ("proj", "output"), ("ffn", "feed-forward")):
        sizes.add_argument(f"--{name}", type=positive, help=f"parameter tokens in each {what} Pattention [tokens]")
    sizes.add_argument("--num_layers", type=positive, help="transformer layers [layers]")
    sizes.add_argument(
        "--factor", type=float, help="in place of sizes: factor on all that the operator adds, rounded to whole counts"
    )
    add_measured_tokens(parser)
    add_section_flags(parser, GrowthRules, "rules of growth")
    args = parser.parse_args(argv)
    if args.config_file is None and all(getattr(args, name) is None for name in SIZES):
        parser.error("what to grow to is missing: give --factor, sizes such as --ffn, or --config_file")
    return args


def with_sizes(job: Rewriting, args: argparse.Namespace, rules: GrowthRules) -> Rewriting:
    """Returns the job with the model of the sizes that the arguments ask for, if they ask for any."""
    asked = {name: getattr(args, name) for name in SIZES}
    if all(size is None for size in asked.values()):
        return job
    from megatron.growth.require_growth import require_growth
    from megatron.growth.target_model import grown_model

    theirs = job.source.config.model
    grown = grown_model(theirs, rules, **asked)
    sizes = {"param_tokens": grown.param_tokens, "num_layers": grown.num_layers}
    model = job.config.model.model_copy(update=sizes)
    require_growth(theirs, model, rules)
    return replace(job, config=job.config.model_copy(update={"model": model}))


def keys_of(growth: Growth) -> list[str]:
    """Returns the overrides that describe the larger model to a configuration of the smaller one."""
    model: ModelConfig = growth.after
    if growth.before.num_layers != model.num_layers:
        return [f"num_layers={model.num_layers}"]
    tokens = model.param_tokens
    return [
        *(f"{name}_slot_num={getattr(tokens, name)}" for name in ("qkv", "proj", "ffn")),
        *(f"{name}_scale_base={getattr(tokens, f'{name}_scale_base')}" for name in ("qkv", "proj", "ffn")),
    ]


if __name__ == "__main__":
    run_tool(main)
