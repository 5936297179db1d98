"""Tokenizers of the SentencePiece library."""

from __future__ import annotations

from collections.abc import Sequence

import sentencepiece

from megatron.config.sections.data import TokenizerConfig
from megatron.data.tokenizer import END_OF_DOCUMENT, TOKENIZERS, configured_file, no_end_of_document
from megatron.errors import DataError


@TOKENIZERS.register("SPMTokenizer")
class SPMTokenizer:
    """A SentencePiece .model. Its end-of-document token is the piece <|endoftext|>, or else the model's own </s>.

    As NeoX's, prepared documents do not begin with its <s>; those of a tokenizer.json do where its template says so.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        path = configured_file(config.vocab_file, "vocab_file", config, "a SentencePiece .model")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path}: not a SentencePiece model ({error}).") from error
        piece = self._processor.piece_to_id(END_OF_DOCUMENT)
        self.eod = piece if piece != self._processor.unk_id() else self._processor.eos_id()
        if self.eod < 0:
            raise no_end_of_document(path)
        begin = self._processor.bos_id()
        self.bos = begin if begin >= 0 else None
        self.vocab_size = self._processor.get_piece_size()

    def vocabulary(self) -> list[tuple[int, str]]:
        return [(id_, self._processor.id_to_piece(id_)) for id_ in range(self.vocab_size)]

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(list(texts))
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([id_ for id_ in ids if id_ != self.eod])
        return text
