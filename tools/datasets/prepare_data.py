"""Prepares data to train on: a public corpus by its name, or real text that needs no download.

    python tools/datasets/prepare_data.py -d ./data -t HFTokenizer --vocab-file tokenizer.json pile
    python tools/datasets/prepare_data.py --output-dir demo/data
    python tools/datasets/prepare_data.py --output-dir demo/data --text mine.txt

Downloads pile, openwebtext2 and enwik8 over https into DATA_DIR/NAME, and tokenizes them, each document ended, to
DATA_DIR/NAME/NAME_text_document; openwebtext, fineweb_edu and wikitext are streamed from the Hugging Face hub. Stopped
at any point, the same command goes on. Files are compared with published hashes, where there are some; a mirror that
has the same files can be named (--base-url).

python_docs, which is meant without a name, makes everything from text that is there. Without --text, that is what every
CPython carries: the language reference (pydoc's topics) and, for each module of the standard library, its docstrings
and its source. With --text, the paragraphs of a .txt file, or the "text" of each line of a .jsonl file. About one
character in twenty is held out, by whole documents. Writes train.jsonl, valid.jsonl, tokenizer.json (byte-level BPE),
train_text_document.bin/.idx, valid_text_document.bin/.idx, and data.json with the counts and the loss that a model must
beat: the cross entropy of the held-out tokens under the frequencies of the training tokens.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import sys
import sysconfig
import time
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import get_args

from megatron_tokenformer import run_tool

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from megatron.config.local_path import local_path
from megatron.config.sections.data import TokenizerConfig, TokenizerType
from megatron.data.dataset_format import DATASET_FORMATS, DEFAULT_FORMAT
from megatron.data.prepare.batches import TokenizeOptions
from megatron.data.prepare.corpora import CORPORA
from megatron.data.prepare.documents import Limits, place, texts_of
from megatron.data.prepare.progress import Tally
from megatron.data.prepare.text_files import TextFile
from megatron.data.prepare.tokenize_files import Work, dataset_prefix, tokenize_files
from megatron.data.prepare.tokenizing_pool import TokenizingPool
from megatron.data.tokenizer import END_OF_DOCUMENT
from megatron.errors import DataError
from megatron.io.durable import atomic_write
from tools.command_line import positive, progress_bar, tool_parser

PYTHON_DOCS = "python_docs"
HELD_OUT = 0.05  # share of the characters
SMALLEST_TEXT = 20_000  # characters
SMALLEST_VOCABULARY = 257  # the bytes and the end-of-document token
# Folders and files of the standard library that are data, generated, vendored, or about testing Python itself.
LEFT_OUT = re.compile(
    r"test|tests|idle_test|site-packages|dist-packages|encodings|ensurepip|idlelib|lib2to3|pydoc_data|distutils|"
    r"turtledemo|__phello__|config-.*|_sysconfig.*"
)

Group = list[str]
"""Documents that say the same twice, such as a module and its manual page; they are held out together or not at all."""


def main(argv: Sequence[str]) -> int:
    """Prepares the data in the given folder."""
    args = parse_args(argv)
    if args.dataset != PYTHON_DOCS:
        prepare_corpus(args)
    else:
        prepare(args.output_dir or args.data_dir / PYTHON_DOCS, args.text, args.vocab_size)
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses NeoX's flags, and those of text that needs no download."""
    parser = tool_parser(__doc__)
    parser.add_argument(
        "dataset", nargs="?", default=PYTHON_DOCS, choices=[*CORPORA, PYTHON_DOCS], help="what to prepare"
    )
    parser.add_argument("-d", "--data-dir", type=local_path, default=Path("data"), help="folder of all corpora (data)")
    corpora = parser.add_argument_group("public corpora")
    corpora.add_argument("-t", "--tokenizer", choices=get_args(TokenizerType), help="kind of tokenizer")
    corpora.add_argument("-v", "--vocab-file", type=local_path, help="tokenizer.json, vocab.json or .model")
    corpora.add_argument("-m", "--merge-file", type=local_path, help="merges.txt of GPT2BPETokenizer")
    corpora.add_argument("--base-url", help="address of a mirror that has the files under the same names")
    corpora.add_argument("--workers", type=positive, default=1, help="processes that tokenize (1)")
    docs = parser.add_argument_group(PYTHON_DOCS)
    docs.add_argument("--output-dir", type=local_path, help="folder for all files (DATA_DIR/python_docs)")
    docs.add_argument("--text", type=local_path, help="your own text, .txt or .jsonl, instead of Python's")
    docs.add_argument("--vocab-size", type=int, default=2048, help="tokens of the tokenizer (2048)")
    args = parser.parse_args(argv)
    if args.dataset == PYTHON_DOCS and args.vocab_size < SMALLEST_VOCABULARY:
        parser.error(f"--vocab-size: {args.vocab_size} does not hold the 256 bytes and {END_OF_DOCUMENT}")
    if args.dataset != PYTHON_DOCS and args.tokenizer is None:
        parser.error(f"{args.dataset} needs --tokenizer, such as -t HFTokenizer --vocab-file tokenizer.json")
    if args.dataset != PYTHON_DOCS and (args.output_dir or args.text):
        parser.error(f"--output-dir and --text belong to {PYTHON_DOCS}; corpora lie in --data-dir")
    return args


def prepare_corpus(args: argparse.Namespace) -> None:
    """Downloads and tokenizes a public corpus. Raises DataError when its source is dead."""
    vocab, merges = (None if path is None else str(path) for path in (args.vocab_file, args.merge_file))
    tokenizer = TokenizerConfig(type=args.tokenizer, vocab_file=vocab, merge_file=merges)
    folder = args.data_dir / args.dataset
    with TokenizingPool(TokenizeOptions(tokenizer, append_eod=True), args.workers) as pool, progress_bar() as bar:
        task = bar.add_task(args.dataset, total=None)
        inputs = CORPORA[args.dataset].inputs(folder, args.base_url, lambda text: bar.update(task, description=text))
        bar.update(task, total=sum(source.size for source in inputs) or None)

        def report(tally: Tally) -> None:
            text = f"{tally.documents:,} documents, {sum(tally.tokens.values()):,} tokens"
            bar.update(task, completed=tally.bytes_read, description=text)

        tally = tokenize_files(inputs, folder / args.dataset, pool, Work(report=report))
    prefix = dataset_prefix(folder / args.dataset, "text")
    print(f"{prefix}: {tally.written['text']:,} documents, {tally.tokens['text']:,} tokens")


def prepare(output_dir: Path, text: Path | None, vocab_size: int) -> None:
    """Writes all files to `output_dir`. Raises DataError when the text is missing, malformed or too small."""
    started = time.monotonic()

    def say(message: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {message}", flush=True)

    source = f"Python {sys.version.split()[0]}" if text is None else str(text)
    say(f"reading {source}")
    groups = list(python_groups() if text is None else own_groups(text))
    parts = dict(zip(("train", "valid"), hold_out(groups, source), strict=True))
    facts: dict[str, str | int | float] = {"source": source}
    for part, documents in parts.items():
        facts |= {f"{part}_documents": len(documents), f"{part}_characters": sum(map(len, documents))}
        write_jsonl(output_dir / f"{part}.jsonl", documents)
    say(f"training a tokenizer on {facts['train_characters']:,} characters")
    tokenizer_file = output_dir / "tokenizer.json"
    vocab_size = train_tokenizer(parts["train"], vocab_size, tokenizer_file)
    facts["vocab_size"] = vocab_size
    options = TokenizeOptions(TokenizerConfig(type="HFTokenizer", vocab_file=str(tokenizer_file)), append_eod=True)
    with TokenizingPool(options, workers=1) as pool:
        for part in parts:
            say(f"tokenizing {part}.jsonl")
            inputs = [TextFile(output_dir / f"{part}.jsonl")]
            tally = tokenize_files(inputs, output_dir / part, pool, Work(overwrite=True))
            facts[f"{part}_tokens"] = tally.tokens["text"]
    train, valid = (token_counts(dataset_prefix(output_dir / part, "text"), vocab_size) for part in parts)
    facts["valid_unigram_nats_per_token"] = unigram_loss(train, valid)
    with atomic_write(output_dir / "data.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n")
    say(f"{facts['train_tokens']:,} tokens to train on, {facts['valid_tokens']:,} held out, in {output_dir}")
    say(f"a unigram model of them has a held-out loss of {facts['valid_unigram_nats_per_token']:.3f} nats per token")


def python_groups() -> Iterator[Group]:
    """Yields the language reference, then each module's manual page and source, in alphabetical order."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise DataError(
            "this Python lacks its language reference (pydoc_data). Give a text of your own: --text."
        ) from None
    for name in sorted(topics):
        yield [topics[name]]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if any(LEFT_OUT.fullmatch(part) for part in parts):
            continue
        with tokenize.open(path) as file:  # heeds the encoding that the file declares
            source = file.read()
        page = manual_page(".".join(parts).removesuffix(".__init__"), ast.parse(source))
        yield [document for document in (page, source) if document.strip()]


def manual_page(module: str, tree: ast.Module) -> str:
    """Renders the docstrings of a module's public classes and functions under their signatures; empty without any."""
    sections = [f"{title}\n\n{text}" for title, text in docstrings(tree, f"Module {module}", "")]
    return "\n\n".join(sections)


def docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, title: str, scope: str
) -> Iterator[tuple[str, str]]:
    """Yields title and docstring of a module, class or function, and of the public ones inside a module or class."""
    text = ast.get_docstring(node)
    if text:
        yield title, text
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            name = scope + child.name
            signature = f"class {name}" if isinstance(child, ast.ClassDef) else f"{name}({ast.unparse(child.args)})"
            yield from docstrings(child, signature, f"{name}.")


def own_groups(path: Path) -> Iterator[Group]:
    """Yields the paragraphs of a .txt file, or the texts of a .jsonl file."""
    source = TextFile(path)
    for raw in source.read(["text"], -1, Limits()):
        try:
            text = texts_of(raw, ["text"])["text"]
        except ValueError as error:
            raise DataError(f"{place(source, raw.number)}: {error}.") from error
        documents = [text] if raw.number else re.split(r"\n\s*\n", text)
        yield from ([document] for document in documents if document.strip())


def hold_out(groups: Sequence[Group], source: str) -> tuple[list[str], list[str]]:
    """Splits documents into training and held-out ones.

    A group is held out when one of average size would bring their share of the characters nearest to HELD_OUT. Raises
    DataError when there is too little text, or none could be held out.
    """
    train: list[str] = []
    valid: list[str] = []
    seen = held_out = 0
    for count, group in enumerate(groups):
        size = sum(map(len, group))
        # The group's own size must not decide, or short documents would be held out more often than long ones.
        if count and held_out + seen / count / 2 <= HELD_OUT * seen:
            held_out += size
            valid += group
        else:
            train += group
        seen += size
    if seen < SMALLEST_TEXT:
        raise DataError(f"{source}: {seen:,} characters; at least {SMALLEST_TEXT:,} are needed. Give a longer --text.")
    if not valid:
        raise DataError(
            f"{source}: {len(groups)} documents are too few to hold one in twenty out. In a .txt file, blank lines "
            "separate documents; in a .jsonl file, each line is one."
        )
    return train, valid


def write_jsonl(path: Path, documents: Sequence[str]) -> None:
    """Writes one {"text": ...} per line."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for document in documents:
            print(json.dumps({"text": document}, ensure_ascii=False), file=file)


def train_tokenizer(documents: Iterable[str], vocab_size: int, path: Path) -> int:
    """Trains a byte-level BPE whose end-of-document token has id 0, and writes it to `path`.

    Returns the size of its vocabulary, which a short text leaves smaller than asked for.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    with atomic_write(path) as temporary:
        tokenizer.save(str(temporary))
    return tokenizer.get_vocab_size()


def token_counts(prefix: Path, vocab_size: int) -> npt.NDArray[np.int64]:
    """Counts the occurrences of each token in a dataset [vocab_size]."""
    dataset = DATASET_FORMATS[DEFAULT_FORMAT].open(prefix)
    documents = [dataset.read(index, 0, int(size)) for index, size in enumerate(dataset.sizes)]
    return np.bincount(np.concatenate(documents), minlength=vocab_size)


def unigram_loss(train: npt.NDArray[np.int64], valid: npt.NDArray[np.int64]) -> float:
    """Computes the cross entropy of the tokens counted in `valid` under the frequencies of `train` [nats per token].

    Each token is counted once more, so that none is impossible.
    """
    log_frequencies = np.log(train + 1) - np.log(train.sum() + len(train))
    return float(-(valid @ log_frequencies) / valid.sum())


if __name__ == "__main__":
    run_tool(main)
