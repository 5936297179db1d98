"""Tokenizes text into datasets that training reads; takes NeoX's flags.

    python tools/datasets/preprocess_data.py --input 'pile/*.jsonl.zst' --output-prefix data/pile \\
        --tokenizer-type HFTokenizer --vocab-file tokenizer.json --append-eod --workers 8
    python tools/datasets/preprocess_data.py ... --shard 3/16          on each of 16 machines, each with its number
    python tools/datasets/preprocess_data.py ... --prompt-key question --completion-key answer
    python tools/datasets/merge_datasets.py --input data/pile_shards --output-prefix data/pile_text_document

Reads .jsonl, .jsonl.gz and .jsonl.zst (one document per line), .txt (one per file), .parquet and datasets that Hugging
Face's library has saved on disk (one per row): files, folders and patterns. Writes <output-prefix>_<key>_document.bin
and .idx, and .manifest.json with what they were made of; `data_path` is their path without the ending. Label datasets
are for `train_label_data_paths`.

A run that was stopped or killed goes on when the same command is run again, and writes the same bytes. With --shard
i/n, machine i makes a dataset of each n-th input in <output-prefix>_shards; what is finished is not done again.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from megatron_tokenformer import run_tool

from megatron.config.local_path import local_path
from megatron.config.sections.data import TokenizerConfig, TokenizerType
from megatron.data.dataset_format import DATASET_FORMATS, DEFAULT_FORMAT
from megatron.data.prepare.batches import Chat, LabelRule, MaskBefore, PromptCompletion, TokenizeOptions
from megatron.data.prepare.documents import DEFAULT_MAX_EXPANSION, DEFAULT_MAX_LINE_BYTES, Input, Limits
from megatron.data.prepare.encoders import EncoderName
from megatron.data.prepare.inputs import find_inputs
from megatron.data.prepare.labels import read_chat_template
from megatron.data.prepare.progress import Tally
from megatron.data.prepare.tables import HubDataset
from megatron.data.prepare.tokenize_files import Work, dataset_prefix, tokenize_files
from megatron.data.prepare.tokenizing_pool import TokenizingPool
from megatron.errors import STOPPED_ON_REQUEST, DataError
from tools.command_line import positive, progress_bar, tool_parser

Part = tuple[list[Input], Path, tuple[int, int] | None]
"""Inputs, prefix of their output, and its number among how many."""


def main(argv: Sequence[str]) -> int:
    """Tokenizes the inputs, then reports what was written."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    args = parse_args(argv)
    options = options_of(args)
    inputs = inputs_of(args)
    works: list[Part] = [(inputs, args.output_prefix, None)]
    if args.shard:
        works = shards(inputs, args.shard, args.output_prefix)
    with stopped_by_signals(), TokenizingPool(options, args.workers) as pool:
        total = sum(source.size for given, *_ in works for source in given)
        with shown_progress(total, args.num_docs, args.log_interval) as progress:
            tallies = []
            for given, output_prefix, part in works:
                work = Work(
                    max_bad_lines=args.max_bad_lines,
                    limits=Limits(args.max_line_bytes, args.max_expansion),
                    overwrite=args.overwrite,
                    part=part,
                    report=progress.report,
                )
                tallies.append(tokenize_files(given, output_prefix, pool, work))
                progress.finish(tallies[-1])
                report_files(options, output_prefix, tallies[-1])
    report_counts(options, tallies)
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses NeoX's flags, with its defaults."""
    parser = tool_parser(__doc__)
    text = parser.add_argument_group("input")
    text.add_argument(
        "--input",
        action="append",
        default=[],
        help="a file, folder or pattern, or several with commas; may be repeated",
    )
    text.add_argument("--hf-dataset", metavar="NAME", help="a dataset of the Hugging Face hub, streamed")
    text.add_argument("--hf-config", metavar="NAME", help="its configuration, where it has several")
    text.add_argument("--hf-split", default="train", metavar="NAME", help="its split (train)")
    text.add_argument("--jsonl-keys", nargs="+", help="keys or columns; a dataset each (text)")
    text.add_argument("--num-docs", type=int, help="documents in the input, if known, for the progress bar")
    text.add_argument("--max-bad-lines", type=int, default=0, help="malformed documents to leave out (0)")
    text.add_argument(
        "--max-line-bytes",
        type=positive,
        default=DEFAULT_MAX_LINE_BYTES,
        help=f"longer lines are malformed; memory grows with them ({DEFAULT_MAX_LINE_BYTES:,})",
    )
    text.add_argument(
        "--max-expansion",
        type=float,
        default=DEFAULT_MAX_EXPANSION,
        help=f"largest ratio of decompressed to compressed bytes ({DEFAULT_MAX_EXPANSION:g})",
    )
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument("--tokenizer-type", required=True, choices=get_args(TokenizerType), help="kind of tokenizer")
    tokenizer.add_argument(
        "--vocab-file", type=local_path, help="tokenizer.json, vocab.json or .model, as the type needs"
    )
    tokenizer.add_argument("--merge-file", type=local_path, help="merges.txt of GPT2BPETokenizer")
    tokenizer.add_argument("--append-eod", action="store_true", help="end each document with the tokenizer's <eod>")
    tokenizer.add_argument("--ftfy", action="store_true", help="mend broken Unicode with the ftfy library")
    labels = parser.add_argument_group("labels, for finetuning: a second dataset says which tokens the loss counts")
    labels.add_argument(
        "--mask-before-token",
        type=token_ids,
        metavar="0,1,1270",
        help="count what follows the first of these token sequences in a document (label_document)",
    )
    labels.add_argument("--prompt-key", metavar="KEY", help="key or column of prompts, which do not count")
    labels.add_argument("--completion-key", metavar="KEY", help="key or column of completions, which do")
    labels.add_argument(
        "--chat-template",
        type=local_path,
        metavar="FILE",
        help=".jinja file or tokenizer_config.json; --jsonl-keys (conversation) then holds lists of messages",
    )
    labels.add_argument("--generation-role", default="assistant", help="role whose messages count (assistant)")
    labels.add_argument("--only-last", action="store_true", help="count the last message of a conversation alone")
    labels.add_argument("--no-mask", action="store_true", help="count every token of conversations")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-prefix", type=local_path, required=True, help="path of the dataset, without _text_document"
    )
    output.add_argument(
        "--dataset-impl", choices=list(DATASET_FORMATS), default=DEFAULT_FORMAT, help=f"format ({DEFAULT_FORMAT})"
    )
    output.add_argument("--overwrite", action="store_true", help="replace an existing dataset, or start over")
    output.add_argument(
        "--shard", type=shard, metavar="i/n", help="this machine's part of the inputs: the i-th of n, from 1"
    )
    runtime = parser.add_argument_group("runtime")
    runtime.add_argument("--workers", type=positive, default=1, help="processes; the result does not depend on it (1)")
    runtime.add_argument(
        "--encoder",
        choices=get_args(EncoderName),
        default="auto",
        help="fastokens encodes many times as fast as tokenizers, whose ids it must give; auto takes it where it does",
    )
    runtime.add_argument("--log-interval", type=positive, default=100, help="documents between progress updates (100)")
    args = parser.parse_args(argv)
    if bool(args.input) == bool(args.hf_dataset):
        parser.error("give --input, or --hf-dataset")
    if args.max_bad_lines < 0 or not args.max_expansion >= 1:
        parser.error("--max-bad-lines is at least 0, --max-expansion at least 1")
    if args.shard and args.hf_dataset:
        parser.error("--shard divides the files of --input; a streamed dataset is one input")
    if bool(args.prompt_key) != bool(args.completion_key):
        parser.error("--prompt-key and --completion-key belong together")
    if sum(map(bool, (args.mask_before_token, args.prompt_key, args.chat_template))) > 1:
        parser.error("one of --mask-before-token, --prompt-key and --chat-template decides the labels")
    args.jsonl_keys = args.jsonl_keys or ["conversation" if args.chat_template else "text"]
    if len(args.jsonl_keys) > 1 and (args.mask_before_token or args.chat_template):
        parser.error("--jsonl-keys: labels belong to one key")
    return args


def token_ids(text: str) -> tuple[int, ...]:
    """Parses token ids with commas between. Raises ArgumentTypeError for anything else."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"expected token ids such as 0,1,1270, not {text!r}")
    return tuple(map(int, words))


def label_rule(args: argparse.Namespace) -> LabelRule | None:
    """Returns what decides the labels. Raises DataError when the chat template cannot be read."""
    if args.mask_before_token:
        return MaskBefore(args.mask_before_token)
    if args.prompt_key:
        return PromptCompletion(args.prompt_key, args.completion_key)
    if args.chat_template:
        template, variables = read_chat_template(args.chat_template)
        return Chat(
            args.jsonl_keys[0],
            template,
            variables,
            args.generation_role,
            only_last=args.only_last,
            counts_all=args.no_mask,
        )
    return None


def shard(text: str) -> tuple[int, int]:
    """Parses `i/n`. Raises ArgumentTypeError unless 1 <= i <= n."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected i/n with 1 <= i <= n, such as 3/16, not {text!r}")
    return int(number), int(count)


def options_of(args: argparse.Namespace) -> TokenizeOptions:
    """Returns the options that decide the tokens."""
    vocab, merges = (None if path is None else str(path) for path in (args.vocab_file, args.merge_file))
    return TokenizeOptions(
        tokenizer=TokenizerConfig(type=args.tokenizer_type, vocab_file=vocab, merge_file=merges),
        keys=tuple(args.jsonl_keys),
        format=args.dataset_impl,
        append_eod=args.append_eod,
        fix_text=args.ftfy,
        labels=label_rule(args),
        encoder=args.encoder,
    )


def inputs_of(args: argparse.Namespace) -> list[Input]:
    """Finds the inputs. Raises DataError when one is missing or of an unknown kind."""
    if args.hf_dataset:
        return [HubDataset(args.hf_dataset, args.hf_config, args.hf_split)]
    return find_inputs(args.input)


def shards(inputs: Sequence[Input], shard: tuple[int, int], output_prefix: Path) -> list[Part]:
    """Returns this machine's inputs, each with the prefix of its output, which sorts as the inputs do.

    Raises DataError when there are fewer inputs than machines.
    """
    number, count = shard
    if len(inputs) < count:
        raise DataError(
            f"--shard {number}/{count}: there are {len(inputs)} inputs, so some machines would have nothing to do. "
            f"Divide by at most {len(inputs)}, or split large files first (split -C 1G --additional-suffix=.jsonl)."
        )
    folder = output_prefix.with_name(f"{output_prefix.name}_shards")
    width = len(str(len(inputs)))
    return [
        (
            [inputs[index]],
            folder / f"{index + 1:0{width}}_{Path(inputs[index].name).name.partition('.')[0]}",
            (index + 1, len(inputs)),
        )
        for index in range(number - 1, len(inputs), count)
    ]


def report_files(options: TokenizeOptions, output_prefix: Path, tally: Tally) -> None:
    """Prints each dataset with its documents and tokens."""
    for name, tokens in tally.tokens.items():
        path = DATASET_FORMATS[options.format].token_file(dataset_prefix(output_prefix, name))
        print(f"{path}: {tally.written[name]:,} documents, {tokens:,} tokens")


def report_counts(options: TokenizeOptions, tallies: Sequence[Tally]) -> None:
    """Prints the closing report over all outputs."""
    documents, empty, bad, text_bytes = (
        sum(getattr(tally, name) for tally in tallies) for name in ("documents", "empty", "bad", "text_bytes")
    )
    names = [name for name, kind in options.outputs().items() if kind == "tokens"]
    tokens = sum(tally.tokens[name] for tally in tallies for name in names)
    print(f"{documents:,} documents; left out: {empty:,} empty, {bad:,} malformed")
    if tokens:
        longest = max(tallies, key=lambda tally: tally.longest)
        print(
            f"{text_bytes:,} bytes of text, {text_bytes / tokens:.2f} bytes per token; longest document: "
            f"{longest.longest:,} tokens ({longest.longest_place})"
        )


class ShownProgress:
    """Shows documents, tokens, speed and the time that is left."""

    def __init__(self, update: Callable[[int, str], None], num_docs: int | None, log_interval: int) -> None:
        self._update = update
        self._by_documents = bool(num_docs)
        self._interval = log_interval
        self._before = Tally()
        self._shown = 0
        self._started: tuple[float, int] | None = None

    def report(self, tally: Tally) -> None:
        """Shows the counts of the output under way."""
        documents = self._before.documents + tally.documents
        if self._started is None:
            self._started = time.monotonic(), tally.text_bytes
        if documents >= self._shown + self._interval:
            self._shown = documents
            self._show(tally, documents)

    def finish(self, tally: Tally) -> None:
        """Adds the counts of an output that is complete."""
        self._show(tally, self._before.documents + tally.documents)
        self._before.documents += tally.documents
        self._before.bytes_read += tally.bytes_read
        self._before.tokens["all"] = self._before.tokens.get("all", 0) + sum(tally.tokens.values())
        self._started = None

    def _show(self, tally: Tally, documents: int) -> None:
        tokens = self._before.tokens.get("all", 0) + sum(tally.tokens.values())
        speed = ""
        if self._started is not None and (seconds := time.monotonic() - self._started[0]) > 0:
            speed = f", {(tally.text_bytes - self._started[1]) / seconds / 1e6:.1f} MB/s"
        done = documents if self._by_documents else self._before.bytes_read + tally.bytes_read
        self._update(done, f"{documents:,} documents, {tokens:,} tokens{speed}")


@contextmanager
def shown_progress(size: int, num_docs: int | None, log_interval: int) -> Iterator[ShownProgress]:
    """Shows a progress bar on standard error, by documents when their number is known, else by bytes of the input."""
    with progress_bar() as bar:
        task = bar.add_task("tokenizing", total=num_docs or size or None)
        yield ShownProgress(
            lambda done, text: bar.update(task, completed=done, description=text), num_docs, log_interval
        )


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Ends the run at SIGTERM and SIGUSR1 with the exit code that asks for another start."""

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        name = signal.Signals(number).name
        os.write(2, f"{name}: stopped; the same command goes on from the last save\n".encode())
        sys.exit(STOPPED_ON_REQUEST)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run_tool(main)
