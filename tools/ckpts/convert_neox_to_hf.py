"""Turns a checkpoint into a Hugging Face folder that transformers loads; NeoX's flags, --trim-vocab, --max-shard-size.

    python tools/ckpts/convert_neox_to_hf.py runs/150M [--output_dir exports/150M]
    python tools/ckpts/convert_neox_to_hf.py --input_dir runs/150M/global_step143000 \\
        --config_file configs/tokenformer/150M.yml --output_dir exports/150M

A run's folder has its configuration, and a place for exports: runs/150M/huggingface/global_step143000.

Any tensor- and pipeline-parallel layout. TokenFormer folders carry their modelling code; load them with
trust_remote_code=True, or import megatron.hf first. Pythia becomes GPTNeoXForCausalLM, GPT-2 GPT2LMHeadModel, LLaMA
LlamaForCausalLM. At the end transformers loads the folder and its logits are compared with ours; when they differ, or
anything else fails, no folder is left.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_tokenformer import run_tool

from megatron.config.load_config import load_words
from megatron.config.local_path import local_path
from megatron.errors import ConfigError
from megatron.registry import install_extra, require
from tools.ckpts.export_flags import add_export_flags
from tools.command_line import add_config_file, positive, stay_on_cpu, tool_parser

EXPORTS = "huggingface"
"""Folder of a run that its exports go to where no other is named."""


def main(argv: Sequence[str]) -> int:
    """Exports the checkpoint, then prints what was written and how well transformers agrees with it."""
    args = parse_args(argv)
    stay_on_cpu()
    require("transformers", "convert_neox_to_hf.py", install_extra("hf"))
    from megatron.checkpointing.store.find_checkpoint import newest_checkpoint
    from megatron.hf.export_checkpoint import DEFAULT_SHARD_BYTES, ExportOptions, export_checkpoint

    run = load_words(args.config_file or [str(args.run)]).run
    checkpoint = newest_checkpoint(args.input_dir or args.run, run.checkpoint.verify_checkpoint)
    architecture = checkpoint.config.model.architecture
    if args.architecture is not None and (args.architecture == "llama") != (architecture == "llama"):
        raise ConfigError(
            f"--architecture {args.architecture}: {checkpoint.path} holds a {architecture}. Leave the flag out."
        )
    output = args.output_dir or args.run / EXPORTS / checkpoint.path.name
    options = ExportOptions(
        precision=args.precision,
        trim_vocab=args.trim_vocab,
        tokenizer=not args.no_save_tokenizer,
        max_shard_bytes=args.max_shard_size or DEFAULT_SHARD_BYTES,
    )
    difference = export_checkpoint(checkpoint, run, output, options)
    print(f"{output}: {checkpoint.path}, logits within {difference:.1e} of ours")
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses NeoX's flags, with its defaults."""
    parser = tool_parser(__doc__)
    parser.add_argument("run", nargs="?", type=local_path, help="a run's folder; its newest checkpoint is exported")
    parser.add_argument("--input_dir", type=local_path, help="a global_stepN folder, or a run's folder")
    add_config_file(parser, "the run's YAML files, in place of those that it keeps")
    parser.add_argument("--output_dir", type=local_path, help="folder to make; it must not hold anything")
    add_export_flags(parser)
    parser.add_argument("--architecture", choices=("neox", "llama"), help="NeoX's; the checkpoint knows what it is")
    parser.add_argument("--no_save_tokenizer", action="store_true", help="leave the tokenizer's files out")
    parser.add_argument("--max-shard-size", type=positive, help="bytes of a weights file (1 GB), at least a layer")
    args = parser.parse_args(argv)
    needed = {"--input_dir": args.input_dir, "--config_file": args.config_file, "--output_dir": args.output_dir}
    missing = [flag for flag, value in needed.items() if value is None]
    if args.run is None and missing:
        parser.error(f"give a run's folder, or {' and '.join(missing)}")
    return args


if __name__ == "__main__":
    run_tool(main)
