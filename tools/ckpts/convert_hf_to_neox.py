"""Turns a Hugging Face folder of TokenFormer, GPTNeoX (Pythia), GPT-2 or LLaMA into a checkpoint.

    python tools/ckpts/convert_hf_to_neox.py --input_dir exports/150M --config_file configs/tokenformer/150M.yml \\
        --output_dir runs/imported
    python tools/ckpts/convert_hf_to_neox.py --input_dir pythia-70m --write-config pythia-70m.yml \\
        --output_dir runs/pythia-70m

Writes <output_dir>/global_step0 and latest: weights alone, in the folder's number format. Train on with `load` and
`finetune: true`, in any layout. --write-config derives the YAML from the folder instead of reading one; where a folder
holds no tokenizer.json, vocab.json and merges.txt, or tokenizer.model, name one: `--write-config new.yml
tokenizer_type=... vocab_file=...`. At the end the logits of the checkpoint are compared with those of transformers;
when anything fails, no output folder is left.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from megatron_tokenformer import run_tool

from megatron.config.local_path import local_path
from megatron.registry import install_extra, require
from tools.command_line import add_config_source, read_config_source, stay_on_cpu, tool_parser


def main(argv: Sequence[str]) -> int:
    """Imports the folder, then prints what was written and how well it agrees with transformers."""
    args = parse_args(argv)
    stay_on_cpu()
    require("transformers", "convert_hf_to_neox.py", install_extra("hf"))
    from megatron.hf.import_config import write_config
    from megatron.hf.import_folder import import_folder

    run = read_config_source(args, "folder", partial(write_config, args.input_dir))
    difference = import_folder(args.input_dir, run, args.output_dir)
    print(f"{args.output_dir}/global_step0: {args.input_dir}, logits within {difference:.1e} of transformers'")
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line, with NeoX's names of the flags."""
    parser = tool_parser(__doc__)
    parser.add_argument("--input_dir", type=local_path, required=True, help="the Hugging Face folder")
    add_config_source(parser, "folder")
    parser.add_argument(
        "--output_dir", type=local_path, required=True, help="folder to make; it must not hold anything"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_tool(main)
