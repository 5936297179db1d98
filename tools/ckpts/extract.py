"""Extracts a smaller model from a TokenFormer's checkpoint: a share of its parameter tokens, optimizer state included.

    python tools/ckpts/extract.py --input_dir runs/elastic --share 0.5 --output_dir runs/half
    python tools/ckpts/extract.py --input_dir runs/elastic --qkv 192 --proj 192 --ffn 768 --output_dir runs/quarter
    python tools/ckpts/extract.py --input_dir runs/elastic --share 1 --groups 1 --output_dir runs/one_group

The smaller model has the first tokens of each of the checkpoint's groups (param_token_groups), which elastic training
has made a model: their rows, bitwise, under the scale of the whole model. It is an ordinary checkpoint: it trains on,
grows, is evaluated and exported as any other. --groups writes the tokens in another number of groups; every share
keeps its tokens, and the model its function. Growth wants one group.

The configuration says layout and precision; without one, the checkpoint's own hold. With --data_path or --text, the
loss of both models is shown. It needs no GPU and no ranks; a layer is in memory at a time.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from megatron_tokenformer import run_tool

from megatron.config.model_size import count_parameters
from megatron.config.sections.model import ModelConfig
from megatron.config.token_share import TOKEN_KEYS, model_of_counts, model_of_share
from megatron.errors import ConfigError
from tools.ckpts.rewriting import add_measured_tokens, add_rewriting, read_rewriting
from tools.command_line import positive, stay_on_cpu, tool_parser


def main(argv: Sequence[str]) -> int:
    """Extracts the model, then prints what was written, and how to train it."""
    args = parse_args(argv)
    stay_on_cpu()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("megatron").setLevel(logging.INFO)
    job = read_rewriting(args)
    from megatron.growth.shrinking.write_smaller import extraction, unchanged, write_smaller

    shrinking = extraction(job.source, smaller_model(job.source.config.model, args), args.groups)
    if args.data_path is not None or args.text is not None:
        from tools.ckpts.measured_tokens import measured_tokens

        tokens = measured_tokens(args.data_path, args.text, job.config, job.source.vocab)
        before, after = unchanged(job.source).loss(tokens), shrinking.loss(tokens)
        print(
            f"On {tokens.numel():,} tokens the loss is {before:.4f} of the whole model, {after:.4f} of this one.",
            flush=True,
        )
    path = write_smaller(shrinking, job.config, job.sizes, args.output_dir, "extract.py")
    change = parameters(job.source.config.model, shrinking.model, job.source.state.padded_vocab_size)
    print(f"{path}: {sizes_of(shrinking.model)} of {job.source.path}, {change}")
    print(f"Train on with: {' '.join(keys_of(shrinking.model))} save={args.output_dir} auto_resume=true")
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = tool_parser(__doc__)
    add_rewriting(parser, "YAML files of the run to come", config_required=False)
    add_sizes(parser)
    parser.add_argument("--groups", type=positive, help="groups to write the tokens in; those of the checkpoint")
    add_measured_tokens(parser)
    return parser.parse_args(argv)


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Adds --share and the counts --qkv, --proj and --ffn, from which `smaller_model` makes a model."""
    sizes = parser.add_argument_group("size of the smaller model")
    sizes.add_argument("--share", type=float, help="part of the parameter tokens of every Pattention, in (0, 1]")
    for name, what in (("qkv", "query, key and value"), ("proj", "output"), ("ffn", "feed-forward")):
        sizes.add_argument(f"--{name}", type=positive, help=f"parameter tokens in each {what} Pattention [tokens]")


def smaller_model(model: ModelConfig, args: argparse.Namespace) -> ModelConfig:
    """Returns the smaller model that the arguments ask for; counts that are not given stay.

    Raises ConfigError for a size that the model does not have, and without any.
    """
    counts = {field: getattr(args, field) for field in TOKEN_KEYS if getattr(args, field) is not None}
    if (args.share is None) == (not counts):
        raise ConfigError("size: give either --share, or counts such as --ffn.")
    if args.share is None:
        return model_of_counts(model, counts)
    if not 0 < args.share <= 1:
        raise ConfigError(f"--share {args.share:g}: expected a part of the tokens above 0 and up to 1, such as 0.5.")
    return model_of_share(model, args.share)


def sizes_of(model: ModelConfig) -> str:
    """Writes a model's counts of parameter tokens."""
    tokens = model.param_tokens
    return ", ".join(f"{key} {getattr(tokens, field):,}" for field, key in TOKEN_KEYS.items())


def parameters(before: ModelConfig, after: ModelConfig, rows: int) -> str:
    """Writes the parameters of two models whose vocabulary has `rows` rows."""
    return f"from {count_parameters(before, rows):,} to {count_parameters(after, rows):,} parameters"


def keys_of(model: ModelConfig) -> list[str]:
    """Returns the overrides that describe the smaller model to a configuration of the whole one."""
    tokens = model.param_tokens
    groups = 1 if tokens is None else tokens.groups
    return [
        *(f"{key}={getattr(tokens, field)}" for field, key in TOKEN_KEYS.items()),
        *(f"{field}_scale_base={getattr(tokens, f'{field}_scale_base')}" for field in TOKEN_KEYS),
        f"param_token_groups={groups}",
        "elastic=null",
    ]


if __name__ == "__main__":
    run_tool(main)
