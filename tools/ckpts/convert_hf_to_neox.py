"""Turn a Hugging Face folder of TokenFormer or GPTNeoX (Pythia) into a checkpoint.

    python tools/ckpts/convert_hf_to_neox.py --input_dir exports/150M --config_file configs/tokenformer/150M.yml \\
        --output_dir runs/imported
    python tools/ckpts/convert_hf_to_neox.py --input_dir pythia-70m --write-config pythia-70m.yml \\
        --output_dir runs/pythia-70m

Writes <output_dir>/global_step0 and latest: weights alone, in the folder's number format. Train on with `load` and
`finetune: true`, in any layout. --write-config derives the YAML from the folder instead of reading one. At the end the
logits of the checkpoint are compared with those of transformers; when anything fails, no output folder is left.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_tokenformer import run_tool

from megatron.config.load_config import load_words
from megatron.registry import require


def main(argv: Sequence[str]) -> int:
    """Import as asked, then say what was written and how well it agrees."""
    args = parse_args(argv)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed writes to standard output that it looks for one
    require("transformers", "convert_hf_to_neox.py", "Install it with `pip install -r requirements/hf.txt`.")
    from megatron.hf.import_config import write_config
    from megatron.hf.import_folder import import_folder

    if args.write_config is not None:
        made = Path(args.write_config[0])
        write_config(args.input_dir, made)
        print(f"{made}: the folder's model as a configuration")
    difference = import_folder(args.input_dir, load_words(args.config_file or args.write_config).run, args.output_dir)
    print(f"{args.output_dir}/global_step0: {args.input_dir}, logits within {difference:.1e} of transformers'")
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """NeoX's names of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_dir", type=Path, required=True, help="the Hugging Face folder")
    config = parser.add_mutually_exclusive_group(required=True)
    config.add_argument(
        "--config_file", nargs="+", metavar="a.yml key=value", help="YAML files that describe the folder's model"
    )
    config.add_argument(
        "--write-config", nargs="+", metavar="new.yml key=value", help="YAML file to make from the folder, and to use"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to make; it must not hold anything")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_tool(main)
