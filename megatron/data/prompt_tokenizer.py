"""Tokens of prompts, which models of LLaMA's kind read behind a begin-of-sequence token."""

from __future__ import annotations

from megatron.config.architecture import ARCHITECTURES
from megatron.config.sections.model import ModelConfig
from megatron.data.tokenizer import Tokenizer


class PromptTokenizer:
    """A tokenizer as a model's prompts need it.

    Where the architecture's prompts begin with a begin-of-sequence token and the tokenizer has one, they have it once,
    as LlamaTokenizer of transformers puts it there. Elsewhere they are what the tokenizer makes of the text.
    """

    def __init__(self, tokenizer: Tokenizer, model: ModelConfig) -> None:
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos if ARCHITECTURES[model.architecture].prompts_begin_with_bos else None
        self._template_begins = self.bos is not None and tokenizer.tokenize("")[:1] == [self.bos]

    @property
    def start(self) -> int:
        """Returns the token that stands before all text: the begin of a sequence, or else the end of a document."""
        return self.tokenizer.eod if self.bos is None else self.bos

    def tokenize(self, text: str, *, begin: bool = True) -> list[int]:
        """Returns the token ids of a text; without `begin`, of one that goes on."""
        ids = self.tokenizer.tokenize(text)
        if self.bos is None:
            return ids
        if self._template_begins:
            ids = ids[1:]
        return [self.bos, *ids] if begin and ids[:1] != [self.bos] else ids


def continuation_text(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """Returns the text that `tokens` add to a prompt. Alone they may read otherwise, as without a first space."""
    before, whole = tokenizer.detokenize(prompt), tokenizer.detokenize(prompt + tokens)
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.detokenize(tokens)
