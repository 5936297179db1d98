"""Prompts as they are read, text as it is shown, records as they are written."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from megatron.config.optimizers.adamw import AdamWConfig
from megatron.config.sections.data import TokenizerConfig
from megatron.config.sections.generation import GenerationConfig
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import TrainingConfig
from megatron.data.prompt_tokenizer import continuation_text
from megatron.data.tokenizers.char_level import CharLevelTokenizer
from megatron.errors import DataError
from megatron.inference.generation.conversation_terminal import ConversationTerminal
from megatron.inference.generation.generate_text import TextGenerator, write_records
from megatron.inference.generation.read_prompts import configured_prompts
from megatron.io import progress
from megatron.loaded_model.rank_pool import RankPool
from megatron.mpu.context import ParallelContext
from tests.helpers.loaded_models import MODELS, generate, loaded_model


def prompts_of(content: str | bytes, folder: Path, prompt_end: str = "\n") -> list[str]:
    path = folder / "prompts.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = GenerationConfig(text_gen_type="input-file", sample_input_file=str(path), prompt_end=prompt_end)
    return list(configured_prompts(config))


def test_lines_are_prompts(tmp_path: Path) -> None:
    assert prompts_of("one\n\n two \n", tmp_path) == ["one", "", " two "]
    assert prompts_of("one\ntwo", tmp_path) == ["one", "two"]
    assert prompts_of("\ufeffone\r\ntwo\u2028three\r\n", tmp_path) == ["one", "two\u2028three"]
    assert prompts_of("\n", tmp_path) == [""]
    with pytest.raises(DataError, match=r"sample_input_file: .*prompts\.txt is empty"):
        prompts_of("", tmp_path)


def test_prompts_with_another_end(tmp_path: Path) -> None:
    assert prompts_of("a\nb##c\n##\n", tmp_path, "##") == ["a\nb", "c\n"]
    assert prompts_of("a\n\nb\nc\n", tmp_path, "\n\n") == ["a", "b\nc\n"]


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
        prompts_of(b"\xff\xfe\x00", tmp_path)


def test_growing_text_is_printed_once_and_whole_characters_only(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = ConversationTerminal("\n")
    printed = []
    for grown in ("caf", "caf\ufffd", "café", "café \ufffd\ufffd", "café 🙂!"):
        terminal.show(grown)
        printed.append(capsys.readouterr().out)
    assert printed == ["caf", "", "é", " ", "🙂!"]
    terminal.finish("café 🙂!\ufffd", "a message")
    ended = capsys.readouterr()
    assert (ended.out, ended.err) == ("\ufffd\n", "[a message]\n")


def test_generated_text_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = ConversationTerminal("\n")
    terminal.show("red \x1b[31m\x07\ttab\nline")
    terminal.finish("red \x1b[31m\x07\ttab\nline\x9b2J", None)
    assert capsys.readouterr().out == "red \ufffd[31m\ufffd\ttab\nline\ufffd2J\n"


def test_text_that_turns_out_otherwise_is_shown_again(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = ConversationTerminal("\n")
    terminal.show("ab")
    terminal.finish("xyz", None)
    assert capsys.readouterr().out == "ab\nxyz\n"


class SpaceEatingTokenizer(CharLevelTokenizer):
    """Drops the space before a text's first word, as SentencePiece does."""

    def detokenize(self, ids: Sequence[int]) -> str:
        return super().detokenize(ids).removeprefix(" ")


class BeginningTokenizer(CharLevelTokenizer):
    """Has a begin-of-sequence token, as LLaMA's do."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        self.bos = 5


def generator_of(tokenizer: CharLevelTokenizer, model: str = "pythia", **settings: Any) -> TextGenerator:
    config = RunConfig(
        model=MODELS[model],
        training=TrainingConfig(train_iters=1, optimizer=AdamWConfig(lr=1e-3), train_micro_batch_size_per_gpu=2),
        generation=GenerationConfig(maximum_tokens=3, **settings),
    )
    return TextGenerator(loaded_model(MODELS[model]), tokenizer, config)


def test_the_space_between_prompt_and_text_is_the_texts() -> None:
    tokenizer = SpaceEatingTokenizer(TokenizerConfig())
    assert continuation_text(tokenizer, tokenizer.tokenize("one"), tokenizer.tokenize(" two")) == " two"
    assert tokenizer.detokenize(tokenizer.tokenize(" two")) == "two"


def test_long_runs_tell_how_far_they_are(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "monotonic", count(0, 60).__next__)
    generator = generator_of(CharLevelTokenizer(TokenizerConfig()), num_samples=5, sample_input_file="unread.txt")
    written = io.StringIO()
    with caplog.at_level(logging.INFO), RankPool(ParallelContext.single(), generator.generate) as pool:
        write_records(generator, pool, written)
    assert len([json.loads(line) for line in written.getvalue().splitlines()]) == 5
    assert caplog.messages == [
        "sample_input_file is not read with text_gen_type: unconditional",
        "2 of 5 samples",
        "4 of 5 samples",
        "5 of 5 samples",
    ]


def test_prompts_of_a_llama_follow_its_begin_of_sequence_token() -> None:
    """An empty one is continued from it, where other architectures continue from the end of a document."""
    prompts = ["\x07\x08", ""]
    for model, before, start in (("llama", [5], 5), ("pythia", [], 0)):
        generator = generator_of(BeginningTokenizer(TokenizerConfig()), model, temperature=0.0)
        requests = [generator.requests(prompt, 0)[0] for prompt in prompts]
        assert [request.tokens for request in requests] == [[*before, 7, 8], []]
        texts = [record["text"] for record in generator.generate("write", requests, {})]
        wanted = generate(generator.model, [[*before, 7, 8], [start]], maximum_tokens=3)
        assert texts == [generator.tokenizer.detokenize(found.tokens) for found in wanted]
