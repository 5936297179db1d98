"""Tokenizes text files into a dataset that training reads; takes NeoX's flags, and --max-bad-lines.

    python tools/datasets/preprocess_data.py --input corpus.jsonl.zst --output-prefix data/corpus \\
        --tokenizer-type HFTokenizer --vocab-file tokenizer.json --append-eod --workers 8

Reads .jsonl, .jsonl.gz and .jsonl.zst (one document per line) and .txt (one document per file). Writes
<output-prefix>_<key>_document.bin and .idx; `data_path` is their path without the ending.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from megatron_tokenformer import run_tool

from megatron.config.local_path import local_path, url_remedy
from megatron.config.sections.data import TokenizerConfig, TokenizerType
from megatron.data.dataset_format import DATASET_FORMATS, DEFAULT_FORMAT
from megatron.data.prepare.tokenize_files import Tally, TokenizeOptions, dataset_prefix, tokenize_files
from megatron.errors import ConfigError
from tools.command_line import positive, progress_bar, tool_parser


def main(argv: Sequence[str]) -> int:
    """Tokenizes the input files, then prints what was written."""
    args = parse_args(argv)
    vocab, merges = (None if path is None else str(path) for path in (args.vocab_file, args.merge_file))
    options = TokenizeOptions(
        tokenizer=TokenizerConfig(type=args.tokenizer_type, vocab_file=vocab, merge_file=merges),
        keys=tuple(args.jsonl_keys),
        format=args.dataset_impl,
        append_eod=args.append_eod,
        fix_text=args.ftfy,
    )
    inputs = [path for given in args.input for path in split_paths(given)]
    with shown_progress(inputs, args.num_docs, args.log_interval) as report:
        tally = tokenize_files(
            inputs,
            args.output_prefix,
            options,
            workers=args.workers,
            max_bad_lines=args.max_bad_lines,
            report=report,
        )
    for key, tokens in tally.tokens.items():
        prefix = dataset_prefix(args.output_prefix, key)
        print(f"{DATASET_FORMATS[options.format].token_file(prefix)}: {tokens:,} tokens")
    print(f"{tally.documents:,} documents; left out: {tally.empty:,} empty, {len(tally.bad_lines):,} malformed")
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses NeoX's flags, with its defaults."""
    parser = tool_parser(__doc__)
    text = parser.add_argument_group("input")
    text.add_argument("--input", action="append", required=True, help="a file, or several with commas; may be repeated")
    text.add_argument("--jsonl-keys", nargs="+", default=["text"], help="keys of the texts; a dataset each (text)")
    text.add_argument("--num-docs", type=int, help="documents in the input, if known, for the progress bar")
    text.add_argument("--max-bad-lines", type=int, default=0, help="malformed lines to leave out before failing (0)")
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument("--tokenizer-type", required=True, choices=get_args(TokenizerType), help="kind of tokenizer")
    tokenizer.add_argument(
        "--vocab-file", type=local_path, help="tokenizer.json, vocab.json or .model, as the type needs"
    )
    tokenizer.add_argument("--merge-file", type=local_path, help="merges.txt of GPT2BPETokenizer")
    tokenizer.add_argument("--append-eod", action="store_true", help="end each document with the tokenizer's <eod>")
    tokenizer.add_argument("--ftfy", action="store_true", help="mend broken Unicode with the ftfy library")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-prefix", type=local_path, required=True, help="path of the dataset, without _text_document"
    )
    output.add_argument(
        "--dataset-impl", choices=list(DATASET_FORMATS), default=DEFAULT_FORMAT, help=f"format ({DEFAULT_FORMAT})"
    )
    runtime = parser.add_argument_group("runtime")
    runtime.add_argument("--workers", type=positive, default=1, help="processes; the result does not depend on it (1)")
    runtime.add_argument("--log-interval", type=positive, default=100, help="documents between progress updates (100)")
    return parser.parse_args(argv)


def split_paths(given: str) -> list[Path]:
    """Splits a comma-separated list of files; a file whose own name has a comma is taken whole."""
    if remedy := url_remedy(given):
        raise ConfigError(f"--input {given}: expected files on this machine{remedy}.")
    return [Path(given)] if Path(given).exists() else [Path(part.strip()) for part in given.split(",")]


@contextmanager
def shown_progress(
    inputs: Sequence[Path], num_docs: int | None, log_interval: int
) -> Iterator[Callable[[Tally], None]]:
    """Shows a progress bar on standard error, by documents when their number is known, else by bytes of the input."""
    total = num_docs or sum(path.stat().st_size for path in inputs if path.is_file())
    shown = 0
    with progress_bar() as bar:
        task = bar.add_task("tokenizing", total=total)

        def report(tally: Tally) -> None:
            nonlocal shown
            if tally.documents >= shown + log_interval or tally.bytes_read == total:
                shown = tally.documents
                description = f"{tally.documents:,} documents, {sum(tally.tokens.values()):,} tokens"
                done = tally.documents if num_docs else tally.bytes_read
                bar.update(task, completed=done, description=description)

        yield report


if __name__ == "__main__":
    run_tool(main)
