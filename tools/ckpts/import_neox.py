"""Turns a checkpoint of GPT-NeoX, or the published TokenFormer weights, into a checkpoint.

    python tools/ckpts/import_neox.py --input pytorch_model.bin --config_file configs/tokenformer/150M.yml \\
        configs/data/pile.yml vocab_file=20B_tokenizer.json --output_dir runs/published-150M
    python tools/ckpts/import_neox.py --input neox/global_step143000 --write-config pythia-1b.yml \\
        --output_dir runs/pythia-1b

--input is a file of all weights, a global_stepN folder of any tensor- and pipeline-parallel layout, or a run's folder.
Writes <output_dir>/global_step0 and latest: weights alone, in the number format that they have. Train on with `load`
and `finetune: true`, in any layout. --write-config makes the YAML from those that NeoX keeps in its checkpoints instead
of reading one. When anything fails, no output folder is left.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tokenformer import run_tool

from megatron.config.local_path import local_path
from megatron.io.progress import PeriodicReport
from tools.command_line import add_config_source, read_config_source, stay_on_cpu, tool_parser

if TYPE_CHECKING:
    from megatron.checkpointing.convert.neox.import_neox import ImportedNeox

SECONDS_BETWEEN_LINES = 2.0


def main(argv: Sequence[str]) -> int:
    """Imports the checkpoint, then prints what was written and what differs from its source."""
    args = parse_args(argv)
    stay_on_cpu()
    from megatron.checkpointing.convert.neox.import_neox import import_neox
    from megatron.checkpointing.convert.neox.neox_config import write_config

    run = read_config_source(args, "checkpoint", partial(write_config, args.input))
    imported = import_neox(args.input, run, args.output_dir, progress_lines())
    print("\n".join(summary(imported, args.output_dir)))
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--input", type=local_path, required=True, help="file of weights, global_stepN folder, or run folder"
    )
    add_config_source(parser, "checkpoint")
    parser.add_argument(
        "--output_dir", type=local_path, required=True, help="folder to make; it must not hold anything"
    )
    return parser.parse_args(argv)


def progress_lines() -> Callable[[int, int], None]:
    """Builds a function that prints on standard error how many layers are done, once this takes long."""
    report = PeriodicReport(partial(print, file=sys.stderr, flush=True), SECONDS_BETWEEN_LINES)
    return lambda done, total: report(f"{done} of {total} layers")


def summary(imported: ImportedNeox, output: Path) -> list[str]:
    """Describes what was written where, and what differs from the source."""
    ranks, dtype = imported.tensor_parallel_size, str(imported.dtype).removeprefix("torch.")
    split = f", merged from {ranks} tensor-parallel ranks" if ranks > 1 else ""
    lines = [f"{output}/global_step0: {imported.source}, {imported.num_parameters:,} parameters in {dtype}{split}"]
    added = imported.vocab.padded - imported.source_rows
    if added:
        what = f"{added} zero rows were added" if added > 0 else f"{-added} rows were cut off"
        lines.append(f"padding of the vocabulary, which `mask_padded_vocab` keeps out of the softmax: {what}")
    if imported.differing:
        name, apart = max(imported.differing.items(), key=lambda item: item[1])
        lines.append(
            f"{len(imported.differing)} replicated parameters differed between tensor-parallel ranks and were "
            f"averaged; most of all {name}, by {apart:.1e}"
        )
    return lines


if __name__ == "__main__":
    run_tool(main)
