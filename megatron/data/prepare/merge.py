"""Puts datasets one after the other into one, in constant memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron.data.dataset_manifest import Manifest, manifest_file, read_manifest
from megatron.data.formats.mmap import IndexedDataset, IndexedDatasetWriter, data_file, index_file
from megatron.errors import DataError
from megatron.io.hashing import sampled_sha256
from megatron.io.working_file import working_path


def parts_in(folder: Path, key: str | None) -> list[Path]:
    """Returns the prefixes of the datasets in a folder, sorted by name; with `key`, of those that end with its name.

    Raises DataError when there is none, keys differ, or a part of a sharded run is missing or unfinished.
    """
    ending = "" if key is None else f"_{key}_document"
    names = {path.name.removesuffix(kind) for kind in (".idx", ".manifest.json") for path in folder.glob(f"*{kind}")}
    names = {name for name in names if name.endswith(ending)}
    if not names:
        raise DataError(f"{folder}: no dataset{f' of the key {key!r}' if key else ''} in this folder.")
    keys = {name.removesuffix("_document").rpartition("_")[2] for name in names if name.endswith("_document")}
    if key is None and len(keys) > 1:
        raise DataError(f"{folder}: has datasets of the keys {', '.join(sorted(keys))}. Choose one with --key.")
    prefixes = [folder / name for name in sorted(names)]
    unfinished = sorted(path.name for path in folder.glob("*.progress.json"))
    if unfinished:
        raise DataError(
            f"{folder}: {unfinished[0].removesuffix('.progress.json')} is not finished. Run preprocess_data.py with "
            "its --shard again, and merge then."
        )
    _require_all_parts(folder, prefixes)
    return prefixes


def merge_datasets(prefixes: Sequence[Path], output: Path, report: Callable[[str], None]) -> Manifest:
    """Writes the documents of all datasets, in order, as one; returns its manifest, which stands beside it.

    Raises DataError when they were made by different tokenizers or have different types, one is damaged or not what its
    manifest says, or none has a document.
    """
    manifests = [read_manifest(prefix) for prefix in prefixes]
    _require_one_tokenizer(prefixes, manifests)
    full = [(p, m) for p, m in zip(prefixes, manifests, strict=True) if m is None or m.documents]
    if not full:
        raise DataError(f"{prefixes[0].parent}: no document in any of the {len(prefixes)} datasets.")
    dtype = IndexedDataset(full[0][0]).dtype
    with IndexedDatasetWriter(output, dtype) as writer:
        for prefix, manifest in full:
            report(str(prefix))
            _append(writer, IndexedDataset(prefix), manifest, dtype)
        merged = _merged_manifest(writer, prefixes, manifests, output)
        manifest_file(output).unlink(missing_ok=True)
    merged.write(output)
    return merged


def _append(writer: IndexedDatasetWriter, dataset: IndexedDataset, manifest: Manifest | None, dtype: np.dtype) -> None:
    if dataset.dtype != dtype:
        raise DataError(
            f"{dataset.token_file}: tokens of type {dataset.dtype.name}; those before it have {dtype.name}. They "
            "are of different vocabularies."
        )
    indices = dataset.document_indices
    if len(indices) != len(dataset) + 1:
        raise DataError(
            f"{index_file(dataset.prefix)}: has documents of several sequences, which are not merged. Tokenize the "
            "data with tools/datasets/preprocess_data.py."
        )
    digest = hashlib.sha256()
    for _, tokens, lengths in dataset.blocks():
        digest.update(tokens.data)
        writer.add_documents(tokens, lengths)
    if manifest is not None and digest.hexdigest() != manifest.files[".bin"].sha256:
        raise DataError(f"{data_file(dataset.prefix)}: not what its manifest says. Make this part again (--overwrite).")


def _merged_manifest(
    writer: IndexedDatasetWriter, prefixes: Sequence[Path], manifests: Sequence[Manifest | None], output: Path
) -> Manifest:
    known = [manifest for manifest in manifests if manifest is not None]
    files = writer.finish()
    first = known[0] if known else None
    return Manifest(
        documents=writer.num_documents,
        tokens=writer.num_tokens,
        files=files,
        tokenizer=first.tokenizer if first else None,
        sampled_sha256=sampled_sha256(working_path(data_file(output))),
        kind=first.kind if first else "tokens",
        append_eod=bool(known) and all(manifest.append_eod for manifest in known),
        options={"merged": [prefix.name for prefix in prefixes]},
        inputs=[source for manifest in known for source in manifest.inputs],
        versions=first.versions if first else {},
    )


def _require_all_parts(folder: Path, prefixes: Sequence[Path]) -> None:
    parts = [manifest.options.get("part") for prefix in prefixes if (manifest := read_manifest(prefix)) is not None]
    numbered = [tuple(part) for part in parts if part]
    if not numbered:
        return
    counts = {count for _, count in numbered}
    if len(counts) > 1:
        raise DataError(f"{folder}: holds parts of {' and '.join(map(str, sorted(counts)))} inputs. Merge one set.")
    missing = sorted(set(range(1, max(counts) + 1)) - {number for number, _ in numbered})
    if missing:
        shown = ", ".join(map(str, missing[:10]))
        raise DataError(
            f"{folder}: of {max(counts)} inputs, {len(missing)} are missing: {shown}. Run preprocess_data.py with "
            "their --shard, and merge then."
        )


def _require_one_tokenizer(prefixes: Sequence[Path], manifests: Sequence[Manifest | None]) -> None:
    known = [(p, m) for p, m in zip(prefixes, manifests, strict=True) if m is not None and m.tokenizer is not None]
    for prefix, manifest in known[1:]:
        first_prefix, first = known[0]
        assert manifest.tokenizer is not None and first.tokenizer is not None, "selected above"  # noqa: S101
        same = manifest.tokenizer.is_same_vocabulary(first.tokenizer)
        if not same or (manifest.append_eod, manifest.kind) != (first.append_eod, first.kind):
            raise DataError(
                f"{manifest_file(prefix)} and {manifest_file(first_prefix)}: made by different tokenizers or options:\n"
                f"  {manifest.kind}, {manifest.tokenizer}, append_eod {manifest.append_eod}\n"
                f"  {first.kind}, {first.tokenizer}, append_eod {first.append_eod}"
            )
