"""Tokenizes inputs into datasets: in bounded memory, byte for byte the same after any number of kills.

Documents are read in order, encoded in batches, by worker processes if wanted, and written in order under working
names. Every few seconds all is brought to disk, with a note of the last document that was written; the same request
goes on from there. A dataset gets its name, and its manifest, when it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.data.dataset_format import DATASET_FORMATS, DatasetFormat, TokenDatasetWriter, dataset_file
from megatron.data.dataset_manifest import (
    Manifest,
    TokenizerFacts,
    manifest_file,
    parse_manifest,
    read_manifest,
    tokenizer_facts,
)
from megatron.data.prepare.batches import Batch, EncodedBatch, FinishedInput
from megatron.data.prepare.documents import Input, Limits, place
from megatron.data.prepare.encoders import FastEncoderMismatchError
from megatron.data.prepare.progress import Progress, Tally, progress_file, read_progress, remove_progress
from megatron.data.prepare.tokenizing_pool import TokenizingPool
from megatron.errors import CheckpointError, DataError
from megatron.io.hashing import sampled_sha256
from megatron.io.lease import FolderLease
from megatron.io.working_file import working_path

logger = logging.getLogger(__name__)

SAVE_SECONDS = 10.0
"""Time between two saves [s], which a kill may cost."""
_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 4096
_BAD_LINES_KEPT = 100
_BAD_LINES_SHOWN = 10
_PACKAGES = ("tokenizers", "fastokens", "sentencepiece", "zstandard", "numpy", "ftfy", "pyarrow", "datasets")


@dataclass(frozen=True)
class Work:
    """Whatever decides how the work is done, and not its result."""

    max_bad_lines: int = 0
    """Malformed documents to leave out before failing."""

    limits: Limits = field(default_factory=Limits)

    overwrite: bool = False
    """Replace an existing dataset, or start an unfinished one over."""

    part: tuple[int, int] | None = None
    """Number of this output among the parts of a larger one, from 1, and the number of parts. A part without a document
    gets a manifest alone."""

    report: Callable[[Tally], None] = lambda tally: None
    """Called after each batch."""


def dataset_prefix(output_prefix: Path, key: str) -> Path:
    """Returns the prefix that NeoX's tools give the dataset of a key."""
    return output_prefix.with_name(f"{output_prefix.name}_{key}_document")


def tokenize_files(inputs: Sequence[Input], output_prefix: Path, pool: TokenizingPool, work: Work) -> Tally:
    """Writes the dataset `<output_prefix>_<key>_document` of each key, and its manifest; returns what it counted.

    A finished request is not done again. Memory is bounded by a few batches of 1 MB for each worker and the longest
    document. Raises DataError when an input is missing or damaged, more documents than allowed are malformed, no token
    comes out, another dataset is in the way, or the disk is full.
    """
    with _only_writer(output_prefix) as lease:
        while True:
            try:
                return _Tokenizing(inputs, output_prefix, pool, work, lease).run()
            except FastEncoderMismatchError as error:
                if pool.options.encoder != "auto":
                    raise
                logger.warning("%s Starting over with the tokenizer itself, which is slower.", error)
                pool.use_tokenizer_itself()
                work = dataclasses.replace(work, overwrite=True)


class _Tokenizing:
    """One request, from where it was left to its end."""

    def __init__(
        self, inputs: Sequence[Input], output_prefix: Path, pool: TokenizingPool, work: Work, lease: FolderLease
    ) -> None:
        self._inputs = inputs
        self._lease = lease
        self._pool = pool
        self._work = work
        self._format: DatasetFormat = DATASET_FORMATS[pool.options.format]
        self._prefixes = {name: dataset_prefix(output_prefix, name) for name in pool.options.outputs()}
        self._progress_file = progress_file(output_prefix)
        self._tokenizer: TokenizerFacts = tokenizer_facts(pool.options.tokenizer, pool.local.tokenizer)
        self._request: dict[str, Any] = {
            "inputs": [source.identity() for source in inputs],
            "options": pool.options.facts(),
            "tokenizer": dataclasses.asdict(self._tokenizer),
        }
        self._writers: dict[str, TokenDatasetWriter] = {}
        self._progress = Progress(self._request)
        self._saved = False

    def run(self) -> Tally:
        """Does what is left to do."""
        done = self._complete()
        if done is not None:
            return done
        found = read_progress(self._progress_file) if not self._work.overwrite else None
        if found is not None and found.request != self._request:
            raise DataError(
                f"{self._progress_file}: an unfinished run with other inputs, options or tokenizer has been here "
                f"({_first_difference(found.request, self._request)}). Run its command again to finish it, name "
                "another --output-prefix, or start over with --overwrite."
            )
        if found is None:
            remove_progress(self._progress_file)
        else:
            self._progress, self._saved = found, True
        if self._progress.finished is None:
            self._tokenize()
        self._publish()
        return self._progress.tally

    def _complete(self) -> Tally | None:
        """Returns the counts of a request that is done. Raises DataError when something else is in its place."""
        if self._work.overwrite or self._progress_file.exists():
            return None
        tally = None
        for prefix in self._prefixes.values():
            manifest = read_manifest(prefix)
            if manifest is None and not any(path.exists() for path in self._format.files(prefix)):
                return None
            if manifest is None or manifest.options.get("request") != self._request:
                what = "made from other inputs, options or tokenizer" if manifest else "without a manifest"
                raise DataError(
                    f"{prefix}: a dataset is there already, {what}. It is not overwritten: name another "
                    "--output-prefix, or give --overwrite."
                )
            for suffix, facts in manifest.files.items():
                path = dataset_file(prefix, suffix)
                if not path.is_file() or path.stat().st_size != facts.size:
                    raise DataError(
                        f"{path}: missing, or not of the size in its manifest. Give --overwrite to make it again."
                    )
            tally = Tally(**manifest.counts)
        logger.info("%s: complete already, from the same inputs", next(iter(self._prefixes.values())))
        return tally

    def _tokenize(self) -> None:
        progress, tally = self._progress, self._progress.tally
        kinds = self._pool.options.outputs()
        try:
            for name, prefix in self._prefixes.items():
                vocab_size = self._tokenizer.vocab_size if kinds[name] == "tokens" else 0
                self._writers[name] = self._format.write(prefix, vocab_size, progress.positions.get(name, {}))
                tally.tokens.setdefault(name, 0)
                tally.written.setdefault(name, 0)
            last_save = time.monotonic()
            for batch, encoded in self._pool.encode(self._batches()):
                self._add(batch, encoded)
                self._work.report(tally)
                if time.monotonic() - last_save >= SAVE_SECONDS:
                    self._save()
                    last_save = time.monotonic()
            self._finish()
        except BaseException:
            for writer in self._writers.values():
                writer.close() if self._saved else writer.discard()
            raise

    def _batches(self) -> Iterator[Batch]:
        """Cuts the documents that are left into batches; the last one tells of the inputs that end behind them."""
        progress, work = self._progress, self._work
        before = sum(source.size for source in self._inputs[: progress.input])
        batch = Batch()
        for number in range(progress.input, len(self._inputs)):
            source = self._inputs[number]
            after = progress.document if number == progress.input else -1
            for raw in source.read(self._pool.options.columns(), after, work.limits):
                batch.places.append((number, raw.number))
                batch.contents.append(raw.content)
                batch.size += len(raw.content) if isinstance(raw.content, bytes) else _row_size(raw.content)
                batch.bytes_read = before + raw.bytes_read
                if batch.size >= _BATCH_BYTES or len(batch.places) >= _BATCH_DOCUMENTS:
                    yield batch
                    batch = Batch()
            before += source.size
            batch.bytes_read = before
            batch.finished.append(FinishedInput(number, source.sha256()))
        yield batch

    def _add(self, batch: Batch, encoded: EncodedBatch) -> None:
        """Writes a batch and counts it."""
        progress, tally = self._progress, self._progress.tally
        self._note_bad(encoded)
        for name, (tokens, lengths) in encoded.outputs.items():
            self._writers[name].add_documents(tokens, lengths)
            tally.tokens[name] += len(tokens)
            tally.written[name] += len(lengths)
        tally.documents += encoded.documents
        tally.empty += encoded.empty
        tally.text_bytes += encoded.text_bytes
        tally.bytes_read = max(tally.bytes_read, batch.bytes_read)
        if encoded.longest[0] > tally.longest:
            tally.longest = encoded.longest[0]
            tally.longest_place = self._place(encoded.longest[1])
        for input_, _ in batch.places:
            progress.inputs[self._entry(input_)]["documents"] += 1
        if batch.places:
            progress.input, progress.document = batch.places[-1]
        for finished in batch.finished:
            progress.inputs[self._entry(finished.input)]["sha256"] = finished.sha256
            if finished.input + 1 > progress.input:
                progress.input, progress.document = finished.input + 1, -1

    def _note_bad(self, encoded: EncodedBatch) -> None:
        tally, limit = self._progress.tally, self._work.max_bad_lines
        for where, reason in encoded.bad:
            tally.bad += 1
            line = f"{self._place(where)}: {reason}"
            if len(tally.bad_lines) < _BAD_LINES_KEPT:
                tally.bad_lines.append(line)
                logger.warning("%s; left out", line)
            if tally.bad > limit:
                shown = "\n  ".join([*tally.bad_lines[-_BAD_LINES_SHOWN:-1], line])
                raise DataError(
                    f"{tally.bad} malformed lines; at most {limit} are allowed (--max-bad-lines):\n  {shown}"
                )

    def _place(self, where: tuple[int, int]) -> str:
        return place(self._inputs[where[0]], where[1])

    def _entry(self, number: int) -> int:
        """Returns the place of an input's facts, which it adds with those of the inputs before."""
        inputs = self._progress.inputs
        while len(inputs) <= number:
            source = self._inputs[len(inputs)]
            inputs.append({"name": source.name, "size": source.size, "sha256": "", "documents": 0})
        return number

    def _save(self) -> None:
        if self._lease.is_in_doubt:
            self._lease.check()
        self._progress.positions = {name: writer.save() for name, writer in self._writers.items()}
        self._progress.write(self._progress_file)
        self._saved = True

    def _finish(self) -> None:
        """Completes the files under their working names, and notes that they are whole."""
        tally = self._progress.tally
        without = [name for name, documents in tally.written.items() if documents == 0]
        if without and not (self._work.part and len(without) == len(tally.written)):
            remove_progress(self._progress_file)
            self._saved = False
            raise DataError(
                f"{self._inputs[0].name}: no text under {without[0]!r} in the input, so there is no dataset to write."
            )
        manifests = {}
        for name, writer in self._writers.items():
            files = writer.finish() if tally.written[name] else {}
            token_file = working_path(self._format.token_file(self._prefixes[name]))
            manifests[name] = Manifest(
                documents=tally.written[name],
                tokens=tally.tokens[name],
                files=files,
                tokenizer=self._tokenizer,
                sampled_sha256=sampled_sha256(token_file) if files else "",
                kind=self._pool.options.outputs()[name],
                append_eod=self._pool.options.append_eod,
                options={"request": self._request, "encoder": self._pool.local.encoder.name, "part": self._work.part},
                inputs=self._progress.inputs,
                counts=dataclasses.asdict(tally),
                versions=_versions(),
            )
        self._progress.finished = {name: dataclasses.asdict(manifest) for name, manifest in manifests.items()}
        self._progress.write(self._progress_file)
        self._saved = True
        for writer in self._writers.values():
            writer.close()

    def _publish(self) -> None:
        """Gives whole files their names: the manifest, which says that the dataset is complete, comes last."""
        for name, content in (self._progress.finished or {}).items():
            prefix, manifest = self._prefixes[name], parse_manifest(content)
            manifest_file(prefix).unlink(missing_ok=True)
            if manifest.files:
                self._format.publish(prefix)
            else:
                for path in self._format.files(prefix):
                    path.unlink(missing_ok=True)
            self._format.discard(prefix)
            manifest.write(prefix)
        remove_progress(self._progress_file)


@contextmanager
def _only_writer(output_prefix: Path) -> Iterator[FolderLease]:
    """Holds the lease of an output. Raises DataError when another process is writing it, or takes it for dead."""
    lease = FolderLease(
        output_prefix.parent, "preprocess_data.py", file=output_prefix.with_name(f"{output_prefix.name}.lease")
    )
    try:
        lease.acquire()
        yield lease
    except CheckpointError as error:
        raise DataError(str(error)) from error
    finally:
        lease.release()


def _first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Describes the first fact in which two requests differ."""
    for section in ("tokenizer", "options"):
        for key in sorted({*theirs.get(section, {}), *ours[section]}):
            before, now = theirs.get(section, {}).get(key), ours[section].get(key)
            if before != now:
                return f"{key}: {before} then, {now} now"
    before, now = theirs.get("inputs", []), ours["inputs"]
    if len(before) != len(now):
        return f"{len(before)} inputs then, {len(now)} now"
    changed: dict[str, Any] = next((ours for other, ours in zip(before, now, strict=True) if other != ours), {})
    return f"{changed.get('name', 'an input')} has changed"


def _row_size(values: Any) -> int:
    return sum(len(value if isinstance(value, str) else repr(value)) for value in (values or {}).values())


def _versions() -> dict[str, str]:
    """Returns the versions of the packages that decide tokens, as far as they are installed."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
