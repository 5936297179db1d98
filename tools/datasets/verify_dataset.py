"""Looks through whole datasets, and names what is wrong.

    python tools/datasets/verify_dataset.py data/pile_text_document data/valid_text_document
    python tools/datasets/verify_dataset.py pythia/document --sha256 0cd548ef...

Reads every token: the index's magic number, sizes and positions, token ids below the vocabulary, the end-of-document
token after each document, and the hashes and counts of the manifest, which also has the vocabulary and the token. For
datasets of other programs, --vocab-size and --eod give those. Ends with 1 when something is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tokenformer import run_tool

from megatron.config.local_path import local_path
from megatron.data.dataset_manifest import manifest_file
from megatron.data.prepare.verify import Expected, problems_of
from tools.command_line import positive, tool_parser


def main(argv: Sequence[str]) -> int:
    """Verifies each dataset; returns 1 when one has a problem."""
    parser = tool_parser(__doc__)
    parser.add_argument("prefix", nargs="+", type=local_path, help="path of a dataset, without .bin or .idx")
    parser.add_argument("--vocab-size", type=positive, help="token ids are below this")
    parser.add_argument("--eod", type=int, help="id of the token that ends each document")
    parser.add_argument("--sha256", help="published hash of the .bin (of a single dataset)")
    args = parser.parse_args(argv)
    if args.sha256 and len(args.prefix) > 1:
        parser.error("--sha256 is the hash of one dataset; give one")
    damaged = 0
    for prefix in args.prefix:
        problems = list(problems_of(prefix, Expected(args.vocab_size, args.eod, args.sha256)))
        damaged += bool(problems)
        note = "" if manifest_file(prefix).exists() else " (no manifest: its hashes cannot be compared)"
        print(f"{prefix}: {'damaged' if problems else f'whole{note}'}")
        for problem in problems:
            print(f"  {problem}")
    return int(damaged > 0)


if __name__ == "__main__":
    run_tool(main)
