"""First tokens of a dataset or of a text, for what is measured on few of them."""

from __future__ import annotations

from pathlib import Path

from megatron.data.dataset_format import dataset_format
from megatron.data.tokenizer import Tokenizer
from megatron.errors import DataError


def first_tokens_of_dataset(prefix: Path, impl: str, wanted: int) -> list[int]:
    """Returns up to `wanted` token ids from a dataset's beginning. Raises DataError when it cannot be read."""
    documents = dataset_format(impl, prefix).open(prefix)
    tokens: list[int] = []
    for index, size in enumerate(documents.sizes.tolist()):
        if len(tokens) >= wanted:
            break
        tokens += documents.read(index, 0, min(size, wanted - len(tokens))).tolist()
    return tokens


def read_text(path: Path) -> str:
    """Reads a text in UTF-8. Raises DataError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text: {path} cannot be read: {error}. Name a text in UTF-8.") from error


def tokens_of_text(path: Path, tokenizer: Tokenizer) -> list[int]:
    """Returns the token ids of a text in UTF-8. Raises DataError when it cannot be read."""
    return tokenizer.tokenize(read_text(path))
