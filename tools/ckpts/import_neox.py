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
    from megatron.checkpointing.convert.neox.import_neox import ImportedNeox, RowBiases

SECONDS_BETWEEN_LINES = 2.0


def main(argv: Sequence[str]) -> int:
    """Imports the checkpoint, then prints what was written and what differs from its source."""
    args = parse_args(argv)
    stay_on_cpu()
    from megatron.checkpointing.convert.neox.import_neox import import_neox
    from megatron.checkpointing.convert.neox.neox_config import write_config

    run = read_config_source(args, "checkpoint", lambda path, words: write_config(args.input, path))
    imported = import_neox(
        args.input, run, args.output_dir, progress_lines(), args.row_parallel_biases, args.grouped_query_rows
    )
    print("\n".join(summary(imported, args.output_dir)))
    if imported.row_biases is not None:
        print(row_biases_line(imported.row_biases, asked_for=args.row_parallel_biases is not None))
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
    parser.add_argument(
        "--row-parallel-biases",
        choices=("sum", "replicas"),
        help="what tensor-parallel ranks hold of them (default: a sum under gpt_j_residual, replicas elsewhere)",
    )
    parser.add_argument(
        "--grouped-query-rows",
        choices=("by-head", "by-kind"),
        help="how a newer GPT-NeoX packed queries, keys and values where num_kv_heads is below num_attention_heads",
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


def row_biases_line(rule: RowBiases, *, asked_for: bool) -> str:
    """Tells by which rule the biases of row-parallel matrices were merged, and when to ask for the other."""
    if rule == "sum":
        merged, other = "summed over ranks", "If every rank holds the whole, add --row-parallel-biases replicas."
    else:
        merged = "one of the ranks' replicas"
        other = "What NeoX's converters wrote is divided by the ranks: for that, add --row-parallel-biases sum."
    why = f"as `gpt_j_residual: {str(rule == 'sum').lower()}` trains them. {other}"
    return f"biases of row-parallel matrices: {merged}, {'as asked for' if asked_for else why}"


if __name__ == "__main__":
    run_tool(main)
