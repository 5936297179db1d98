"""Tokenizes text files into datasets.

Documents are read in order, tokenized in batches, by worker processes if wanted, and written in order, so that the
result does not depend on the number of workers.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.config.sections.data import TokenizerConfig
from megatron.data.dataset_format import DATASET_FORMATS, DEFAULT_FORMAT
from megatron.data.prepare.text_files import RawDocument, read_documents, require_text_files, texts_of
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.errors import DataError, EnvironmentSetupError
from megatron.registry import require

logger = logging.getLogger(__name__)

_BATCH_BYTES = 1 << 20
_BATCHES_AHEAD = 4  # per worker
_BAD_LINES_SHOWN = 10


@dataclass(frozen=True)
class TokenizeOptions:
    """Options that decide the tokens of a dataset."""

    tokenizer: TokenizerConfig

    format: str = DEFAULT_FORMAT
    """Dataset format to write."""

    keys: tuple[str, ...] = ("text",)
    """Keys of a JSON line's texts; each gets a dataset of its own. The text of a .txt file counts as the first."""

    append_eod: bool = False
    """End each document with the tokenizer's end-of-document token."""

    fix_text: bool = False
    """Mend broken Unicode with the ftfy library."""


@dataclass
class Tally:
    """Counts of the work done so far."""

    documents: int = 0
    """Documents read, without bad lines."""

    empty: int = 0
    """Texts without a token; they are left out."""

    bad_lines: list[str] = field(default_factory=list)
    """file:line and reason of each malformed line; they are left out."""

    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens written, by key."""

    bytes_read: int = 0
    """Of the input files as they lie on disk [bytes]."""


def dataset_prefix(output_prefix: Path, key: str) -> Path:
    """Returns the prefix that NeoX's tools give the dataset of a key."""
    return output_prefix.with_name(f"{output_prefix.name}_{key}_document")


def tokenize_files(
    inputs: Sequence[Path],
    output_prefix: Path,
    options: TokenizeOptions,
    *,
    workers: int = 1,
    max_bad_lines: int = 0,
    report: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Writes the dataset `<output_prefix>_<key>_document` of each key from text files.

    `report` is called after each batch. Memory stays bounded by the longest document and a few batches per worker.
    Raises DataError, leaving nothing half-written, when an input is missing or damaged, more than `max_bad_lines` lines
    are malformed, or no token comes out.
    """
    require_text_files(inputs)
    tokenizer = build_tokenizer(options.tokenizer)
    files = DATASET_FORMATS[options.format]
    tally = Tally(tokens=dict.fromkeys(options.keys, 0))
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(files.write(dataset_prefix(output_prefix, key), tokenizer.vocab_size))
            for key in options.keys
        }
        if workers == 1:
            tokenized: Iterator[_TokenizedBatch] = map(partial(_tokenize, options, tokenizer), _batches(inputs))
        else:
            tokenized = _in_order(_start(workers, stack), options, _batches(inputs), _BATCHES_AHEAD * workers)
        for batch in tokenized:
            _note_bad_lines(tally, batch.bad_lines, max_bad_lines)
            for key, documents in batch.documents.items():
                for tokens in documents:
                    if len(tokens):
                        writers[key].add_document(tokens)
                        tally.tokens[key] += len(tokens)
                    else:
                        tally.empty += 1
            tally.documents += batch.num_documents
            tally.bytes_read = batch.bytes_read
            report(tally)
        for key, count in tally.tokens.items():
            if count == 0:
                raise DataError(f"{inputs[0]}: no text under {key!r} in the input, so there is no dataset to write.")
    return tally


def _note_bad_lines(tally: Tally, bad_lines: Sequence[str], limit: int) -> None:
    for bad_line in bad_lines:
        tally.bad_lines.append(bad_line)
        if len(tally.bad_lines) > limit:
            shown = "\n  ".join(tally.bad_lines[-_BAD_LINES_SHOWN:])
            raise DataError(
                f"{len(tally.bad_lines)} malformed lines; at most {limit} are allowed (--max-bad-lines):\n  {shown}"
            )
        logger.warning("%s; left out", bad_line)


@dataclass(frozen=True)
class _TokenizedBatch:
    documents: dict[str, list[npt.NDArray[np.int64]]]
    num_documents: int
    bad_lines: list[str]
    bytes_read: int


def _batches(inputs: Sequence[Path]) -> Iterator[list[RawDocument]]:
    batch: list[RawDocument] = []
    size = 0
    for document in read_documents(inputs):
        batch.append(document)
        size += len(document.content)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _start(workers: int, stack: ExitStack) -> ProcessPoolExecutor:
    # Spawned, not forked: the caller's progress display may run a thread, and the tokenizers library its own.
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_one_thread_per_worker)
    stack.callback(executor.shutdown, cancel_futures=True)
    return executor


def _in_order(
    executor: ProcessPoolExecutor, options: TokenizeOptions, batches: Iterator[list[RawDocument]], ahead: int
) -> Iterator[_TokenizedBatch]:
    pending: deque[Future[_TokenizedBatch]] = deque()
    try:
        for batch in batches:
            pending.append(_submit(executor, options, batch))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise EnvironmentSetupError(
            "a tokenizing process died, most likely for lack of memory. Use fewer --workers, or split long documents."
        ) from error


def _submit(
    executor: ProcessPoolExecutor, options: TokenizeOptions, batch: list[RawDocument]
) -> Future[_TokenizedBatch]:
    # Which may start a worker. It keeps what is blocked here: Ctrl-C is for this process, which ends its workers.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit(_tokenize_in_worker, options, batch)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _one_thread_per_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


_worker_tokenizer = cache(build_tokenizer)  # built once in each worker process


def _tokenize_in_worker(options: TokenizeOptions, batch: list[RawDocument]) -> _TokenizedBatch:
    return _tokenize(options, _worker_tokenizer(options.tokenizer), batch)


def _tokenize(options: TokenizeOptions, tokenizer: Tokenizer, batch: list[RawDocument]) -> _TokenizedBatch:
    documents: list[dict[str, str]] = []
    bad_lines: list[str] = []
    for raw in batch:
        try:
            documents.append(texts_of(raw, options.keys))
        except ValueError as error:
            bad_lines.append(f"{raw.place}: {error}")
    tokens = {}
    for key in options.keys:
        texts = [document[key] for document in documents if key in document]
        if options.fix_text:
            ftfy = require("ftfy", "--ftfy", "Install it with `pip install ftfy`, or leave the flag out.")
            texts = [ftfy.fix_text(text) for text in texts]
        end = [tokenizer.eod] if options.append_eod else []
        tokens[key] = [np.array(ids + end if ids else ids, dtype=np.int64) for ids in tokenizer.tokenize_batch(texts)]
    return _TokenizedBatch(tokens, len(documents), bad_lines, batch[-1].bytes_read)
