"""The file beside a dataset that says what it is: `<prefix>.manifest.json`.

It holds what made the dataset (inputs with their hashes, tokenizer, options, versions), what it counts, and the size
and hash of each of its files. Datasets of other programs have none, and are read as they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.config.sections.data import DataConfig, TokenizerConfig
from megatron.data.dataset_format import dataset_file
from megatron.data.tokenizer import Tokenizer
from megatron.errors import DataError
from megatron.io.durable import replace_durably
from megatron.io.hashing import file_sha256
from megatron.io.json_files import describe_read_error, read_json_object
from megatron.io.working_file import FileFacts

logger = logging.getLogger(__name__)

SUFFIX = ".manifest.json"
_FORMAT_VERSION = 1
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class TokenizerFacts:
    """Facts that tell one tokenizer from another."""

    type: str
    """NeoX's tokenizer_type."""
    vocab_size: int
    eod: int
    """Id of the end-of-document token."""
    vocabulary_sha256: str
    """Hash of every id and its token."""
    files: dict[str, str]
    """SHA-256 of the tokenizer's files, by name."""

    def is_same_vocabulary(self, other: TokenizerFacts) -> bool:
        """Tells whether ids mean the same in both, whatever files they were read from."""
        return (self.vocab_size, self.eod, self.vocabulary_sha256) == (
            other.vocab_size,
            other.eod,
            other.vocabulary_sha256,
        )

    def __str__(self) -> str:
        """Describes the tokenizer in a message."""
        files = ", ".join(self.files) or "no files"
        return (
            f"{self.type} of {files}: {self.vocab_size:,} ids, end of document {self.eod}, "
            f"vocabulary {self.vocabulary_sha256[:12]}"
        )


def tokenizer_facts(config: TokenizerConfig, tokenizer: Tokenizer) -> TokenizerFacts:
    """Returns the facts of a tokenizer that was built from `config`."""
    vocabulary = hashlib.sha256()
    for id_, token in sorted(tokenizer.vocabulary()):
        vocabulary.update(f"{id_}\t{json.dumps(token)}\n".encode())
    names = [name for name in (config.vocab_file, config.merge_file) if name is not None]
    files = {Path(name).name: file_sha256(Path(name)) for name in names if Path(name).is_file()}
    return TokenizerFacts(config.type, tokenizer.vocab_size, tokenizer.eod, vocabulary.hexdigest(), files)


@dataclass(frozen=True)
class Manifest:
    """Facts of one dataset."""

    documents: int
    tokens: int
    files: dict[str, FileFacts]
    """Size and hash of each file, by its ending; empty where there was no document, and hence no dataset."""
    tokenizer: TokenizerFacts | None = None
    sampled_sha256: str = ""
    """Hash of 64 pieces of the token file (`io.hashing.sampled_sha256`), which each start compares."""
    kind: str = "tokens"
    """`tokens`, or `labels` of another dataset's tokens."""
    append_eod: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """What else decided the tokens."""
    inputs: list[dict[str, Any]] = field(default_factory=list)
    """Name, size [bytes], SHA-256 and documents of each input."""
    counts: dict[str, Any] = field(default_factory=dict)
    """What the closing report tells."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that made it."""

    def write(self, prefix: Path) -> None:
        """Writes the manifest beside the dataset."""
        content = {"format_version": _FORMAT_VERSION, **dataclasses.asdict(self)}
        path = manifest_file(prefix)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_durably(path, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}). Make room, and run it again.") from error


def manifest_file(prefix: Path) -> Path:
    """Returns the path of a dataset's manifest."""
    return dataset_file(prefix, SUFFIX)


def read_manifest(prefix: Path) -> Manifest | None:
    """Reads the manifest of a dataset; None where it has none. Raises DataError when it is damaged."""
    path = manifest_file(prefix)
    if not path.exists():
        return None
    try:
        content = read_json_object(path, _MAX_BYTES)
        if content.pop("format_version", None) != _FORMAT_VERSION:
            raise ValueError(f"is not a manifest of version {_FORMAT_VERSION}")
        return parse_manifest(content)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: {describe_read_error(error)}. Copy it again, or delete it: the dataset is then read as another "
            "program's, without a comparison."
        ) from error


def require_manifests(data: DataConfig, tokenizer: TokenizerFacts, fingerprint: Mapping[str, str]) -> None:
    """Raises DataError when a dataset of the configuration was made by another tokenizer, or is not what was written.

    The size and the sampled pieces of the tokens and the whole index are compared, as `fingerprint`
    (data_fingerprint.py) has them. A dataset without a manifest is accepted with a note.
    """
    foreign = []
    for key, prefix in dataset_paths(data):
        manifest = read_manifest(prefix)
        if manifest is None:
            foreign.append(str(prefix))
            continue
        for suffix, facts in manifest.files.items():
            found = fingerprint.get(f"{key} ({suffix})")
            sampled = f"{facts.size} bytes, sha256 of pieces {manifest.sampled_sha256}"
            if found is not None and found not in (f"sha256 {facts.sha256}", sampled):
                raise DataError(
                    f"{key}: {dataset_file(prefix, suffix)} is not what {manifest_file(prefix).name} says. One of them "
                    "is damaged or of another dataset: tools/datasets/verify_dataset.py tells more. Copy the dataset "
                    "again, or tokenize the data again."
                )
        if manifest.tokenizer is not None and not manifest.tokenizer.is_same_vocabulary(tokenizer):
            raise DataError(
                f"{key}: {prefix} was tokenized by another tokenizer than the configured one.\n"
                f"  dataset:    {manifest.tokenizer}\n  configured: {tokenizer}\n"
                "Configure the one that made the dataset (tokenizer_type, vocab_file), or tokenize the data again."
            )
    if foreign:
        logger.info(
            "no manifest beside %s: whether this tokenizer made %s is not checked",
            ", ".join(foreign),
            "it" if len(foreign) == 1 else "them",
        )


def dataset_paths(data: DataConfig) -> Iterator[tuple[str, Path]]:
    """Yields key and prefix of every dataset that a configuration names."""
    if data.data_path is not None:
        yield "data_path", Path(data.data_path)
    for part in ("train", "valid", "test"):
        for kind in ("data_paths", "label_data_paths"):
            for number, path in enumerate(getattr(data, f"{part}_{kind}") or []):
                yield f"{part}_{kind}[{number}]", Path(path)


def parse_manifest(content: Mapping[str, Any]) -> Manifest:
    """Makes a manifest of the content of its file. Raises ValueError when it is not whole."""
    try:
        values = dict(content)
        values["files"] = {str(name): _file_facts(facts) for name, facts in values["files"].items()}
        if values.get("tokenizer") is not None:
            values["tokenizer"] = _tokenizer_facts(values["tokenizer"])
        for key, kind in (("documents", int), ("tokens", int), ("sampled_sha256", str), ("inputs", list)):
            if not isinstance(values[key], kind):
                raise ValueError(f"{key!r} is no {kind.__name__}")
        known = {entry.name for entry in dataclasses.fields(Manifest)}
        return Manifest(**{key: value for key, value in values.items() if key in known})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is not a whole manifest ({error!r})") from error


def _file_facts(content: Mapping[str, Any]) -> FileFacts:
    if type(content["size"]) is not int or not isinstance(content["sha256"], str):
        raise ValueError("has sizes or hashes of a wrong type")
    return FileFacts(content["size"], content["sha256"])


def _tokenizer_facts(content: Mapping[str, Any]) -> TokenizerFacts:
    facts = TokenizerFacts(**content)
    numbers = all(type(value) is int for value in (facts.vocab_size, facts.eod))
    if not (numbers and isinstance(facts.vocabulary_sha256, str) and isinstance(facts.files, dict)):
        raise ValueError("has a tokenizer of a wrong form")
    return facts
