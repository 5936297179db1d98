"""LLaMA's prompts begin with <s>, as transformers and lm-eval put it there; other architectures' do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from lm_eval.models.huggingface import HFLM
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaTokenizer

from megatron.config.sections.data import TokenizerConfig
from megatron.data.prompt_tokenizer import PromptTokenizer
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import DataError
from megatron.hf.tokenizer_files import write_tokenizer
from megatron.inference.evaluation.harness.harness_model import HarnessModel
from megatron.inference.evaluation.harness.response_cache import ResponseCache
from tests.helpers.models import tiny_llama, tiny_pythia
from tests.helpers.tokenizer_files import CORPUS, write_sentencepiece, write_tokenizers

TEXTS = ["The quick brown fox", " jumps", "It's naïve 中 🙂", ""]


def byte_pairs(path: Path, *, template: bool) -> TokenizerConfig:
    """A tokenizer.json with LLaMA's special tokens; its template may put <s> before a text, as that of LLaMA's does."""
    library = ByteLevelBPETokenizer()
    special = ["<unk>", "<s>", "</s>"]
    library.train_from_iterator(CORPUS, vocab_size=320, min_frequency=1, special_tokens=special, show_progress=False)
    if template:
        library.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    library.save(str(path))
    return TokenizerConfig(type="HFTokenizer", vocab_file=str(path))


@pytest.mark.parametrize("template", [True, False])
def test_an_exported_folder_begins_texts_as_prompts_begin_here(template: bool, tmp_path: Path) -> None:
    config, model = byte_pairs(tmp_path / "tokenizer.json", template=template), tiny_llama()
    prompts = PromptTokenizer(build_tokenizer(config), model)
    write_tokenizer(tmp_path / "hf", config, model)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        assert prompts.tokenize(text) == theirs(text)["input_ids"]
        assert prompts.tokenize(text, begin=False) == theirs(text, add_special_tokens=False)["input_ids"]
        assert prompts.tokenize(text)[0] == prompts.start == theirs.bos_token_id == 1
    assert prompts.tokenizer.eod == theirs.eos_token_id == 2


def test_sentencepiece_prompts_are_those_of_llamatokenizer(tmp_path: Path) -> None:
    """LLaMA's own is a BPE model as well; its tokenizer_config.json says add_bos_token: true."""
    file, model = write_sentencepiece(tmp_path / "tokenizer.model"), tiny_llama()
    config = TokenizerConfig(type="SPMTokenizer", vocab_file=str(file))
    prompts, theirs = (
        PromptTokenizer(build_tokenizer(config), model),
        LlamaTokenizer.from_pretrained(tmp_path, add_bos_token=True),
    )
    write_tokenizer(tmp_path / "hf", config, model)
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        assert prompts.tokenize(text) == exported(text)["input_ids"]
        # LlamaTokenizer has come to spare a text its first space; LLaMA's own files and SentencePiece do not.
        assert prompts.tokenize(text) == theirs(text)["input_ids"] or text.startswith(" ")
        assert exported.decode(exported(text)["input_ids"], skip_special_tokens=True) == text
    assert prompts.start == theirs.bos_token_id == exported.bos_token_id


def test_a_sentencepiece_model_that_transformers_reads_otherwise_is_refused(tmp_path: Path) -> None:
    file = write_tokenizers(tmp_path) / "plain.model"
    with pytest.raises(DataError, match=r"transformers (encodes|cannot convert)"):
        write_tokenizer(tmp_path / "hf", TokenizerConfig(type="SPMTokenizer", vocab_file=str(file)), tiny_llama())


def test_other_architectures_keep_what_the_tokenizer_says(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(byte_pairs(tmp_path / "tokenizer.json", template=False))
    prompts = PromptTokenizer(tokenizer, tiny_pythia())
    assert [prompts.tokenize(text) for text in TEXTS] == [tokenizer.tokenize(text) for text in TEXTS]
    assert prompts.start == tokenizer.eod


@pytest.mark.parametrize("template", [True, False])
def test_lm_eval_sees_the_tokens_that_its_own_adapter_would(template: bool, tmp_path: Path) -> None:
    config = byte_pairs(tmp_path / "tokenizer.json", template=template)
    model = tiny_llama()
    write_tokenizer(tmp_path / "hf", config, model)
    theirs = HFLM.__new__(HFLM)
    theirs.tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs.add_bos_token = theirs.custom_prefix_token_id = None
    theirs.backend = "causal"
    prompts = PromptTokenizer(build_tokenizer(config), model)
    ours = HarnessModel(lambda *_: [], prompts, 16, lambda length: 1, ResponseCache(None))
    assert ours.prefix_token_id == theirs.prefix_token_id == 1
    for text in [*TEXTS, "<s>The quick"]:
        for special in (None, True, False):
            if special is not True or not text.startswith("<s>"):
                assert ours.tok_encode(text, add_special_tokens=special) == theirs.tok_encode(text, special), (
                    text,
                    special,
                )
    assert ours._encode_pair("The quick ", "brown fox") == theirs._encode_pair("The quick ", "brown fox")
