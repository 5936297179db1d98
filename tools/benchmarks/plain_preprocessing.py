"""The plain pipeline that benchmark_preprocessing.py compares with: the way of NeoX's preprocess_data.py.

One `encode` for each document, in a process pool if there are several workers, and one write for each document.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_tokenformer import run_tool

import numpy as np
import tokenizers

from megatron.data.formats.mmap import data_file, index_file
from megatron.data.tokenizer import END_OF_DOCUMENT
from tools.command_line import positive, tool_parser

CHUNK = 25  # documents that NeoX hands to a worker at once
INDEX_HEADER = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + (8).to_bytes(1, "little")


class Encoder:
    """A tokenizer, made anew in each worker."""

    tokenizer: tokenizers.Tokenizer
    eod: int | None

    def __init__(self, path: str) -> None:
        self.path = path

    def start(self) -> None:
        """Loads the tokenizer."""
        Encoder.tokenizer = tokenizers.Tokenizer.from_file(self.path)
        Encoder.eod = Encoder.tokenizer.token_to_id(END_OF_DOCUMENT)

    def encode(self, text: str) -> list[int]:
        """Encodes one document."""
        ids: list[int] = Encoder.tokenizer.encode(text).ids
        if ids and Encoder.eod is not None:
            ids.append(Encoder.eod)
        return ids


def texts(path: str) -> Iterator[str]:
    """Yields the text of each line."""
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def main(argv: Sequence[str]) -> int:
    """Tokenizes INPUT by TOKENIZER into PREFIX with so many WORKERS."""
    parser = tool_parser(__doc__)
    parser.add_argument("source", help="text as JSON lines")
    parser.add_argument("tokenizer", help="tokenizer.json")
    parser.add_argument("prefix", help="path of the dataset, without its endings")
    parser.add_argument("workers", type=positive, help="processes")
    args = parser.parse_args(argv)
    encoder = Encoder(args.tokenizer)
    if args.workers > 1:
        pool = multiprocessing.get_context("spawn").Pool(args.workers, initializer=encoder.start)
        documents: Iterator[list[int]] = pool.imap(encoder.encode, texts(args.source), chunksize=CHUNK)
    else:
        encoder.start()
        documents = map(encoder.encode, texts(args.source))
    prefix = Path(args.prefix)
    sizes: list[int] = []
    with data_file(prefix).open("wb") as file:
        for ids in documents:
            if ids:
                file.write(np.array(ids, dtype=np.uint16).tobytes(order="C"))
                sizes.append(len(ids))
    pointers = np.cumsum([0, *sizes[:-1]], dtype=np.int64) * 2
    with index_file(prefix).open("wb") as file:
        file.write(INDEX_HEADER + len(sizes).to_bytes(8, "little") + (len(sizes) + 1).to_bytes(8, "little"))
        file.write(np.array(sizes, dtype=np.int32).tobytes() + pointers.tobytes())
        file.write(np.arange(len(sizes) + 1, dtype=np.int64).tobytes())
    return 0


if __name__ == "__main__":
    run_tool(main)
