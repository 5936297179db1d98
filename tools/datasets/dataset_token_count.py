"""Prints how many documents and tokens datasets hold.

    python tools/datasets/dataset_token_count.py data/pile_text_document data/valid_text_document

Reads the indices alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tokenformer import run_tool

import numpy as np

from megatron.config.local_path import local_path
from megatron.data.formats.mmap import IndexedDataset
from tools.command_line import tool_parser


def main(argv: Sequence[str]) -> int:
    """Prints a line for each dataset, and the sum."""
    parser = tool_parser(__doc__)
    parser.add_argument("prefix", nargs="+", type=local_path, help="path of a dataset, without .bin or .idx")
    args = parser.parse_args(argv)
    documents = tokens = 0
    for prefix in args.prefix:
        dataset = IndexedDataset(prefix)
        count = int(dataset.sizes.sum(dtype=np.int64))
        longest = int(dataset.sizes.max(initial=0))
        print(
            f"{prefix}: {len(dataset):,} documents, {count:,} tokens ({dataset.dtype.name}); "
            f"{count / max(len(dataset), 1):,.1f} per document, longest {longest:,}"
        )
        documents, tokens = documents + len(dataset), tokens + count
    if len(args.prefix) > 1:
        print(f"together: {documents:,} documents, {tokens:,} tokens")
    return 0


if __name__ == "__main__":
    run_tool(main)
