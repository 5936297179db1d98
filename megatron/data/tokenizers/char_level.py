"""NeoX's tokenizer of bytes."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.config.sections.data import TokenizerConfig
from megatron.data.tokenizer import TOKENIZERS

_VOCABULARY = 512
_EOD = 0
_PAD = 1


@TOKENIZERS.register("CharLevelTokenizer")
class CharLevelTokenizer:
    """The bytes of UTF-8. NeoX's constants: 512 ids, end of document 0, padding 1."""

    def __init__(self, config: TokenizerConfig) -> None:
        del config  # bytes need no file
        self.vocab_size = _VOCABULARY
        self.eod = _EOD
        self.bos = None

    def vocabulary(self) -> list[tuple[int, str]]:
        return [(byte, f"byte {byte}") for byte in range(256)]

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.tokenize(text) for text in texts]

    def detokenize(self, ids: Sequence[int]) -> str:
        return bytes(id_ for id_ in ids if _PAD < id_ < 256).decode(errors="replace")
