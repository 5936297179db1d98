"""A run's tokenizer as transformers loads it: tokenizer.json and its settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers
from tokenizers import AddedToken
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace
from tokenizers.normalizers import Sequence as NormalizerSequence
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import Sequence, TemplateProcessing
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from megatron.config.sections.data import TokenizerConfig
from megatron.config.sections.model import ModelConfig
from megatron.data.prompt_tokenizer import PromptTokenizer
from megatron.data.tokenizer import END_OF_DOCUMENT, Tokenizer, build_tokenizer
from megatron.data.tokenizers.huggingface import read_tokenizer_json
from megatron.errors import DataError, UntypedErrorsAs
from megatron.registry import Registry

PADDING = "<|padding|>"
SPACE = "\u2581"
"""The character by which SentencePiece writes a space."""
SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    " and the next one",
    "def f(x):\n    return x  # two  spaces,\ta tab\n\n",
    "naïve café — 中文 русский 🙂 1234567890",
)

TOKENIZER_FILES: Registry[Callable[[TokenizerConfig, Tokenizer], tokenizers.Tokenizer]] = Registry(
    "tokenizer with a form for transformers"
)
"""(configuration, the tokenizer built from it) -> the same for the tokenizers library."""


@TOKENIZER_FILES.register("HFTokenizer")
def _from_tokenizer_json(config: TokenizerConfig, ours: Tokenizer) -> tokenizers.Tokenizer:
    return read_tokenizer_json(Path(str(config.vocab_file)))


@TOKENIZER_FILES.register("GPT2BPETokenizer")
def _from_vocab_and_merges(config: TokenizerConfig, ours: Tokenizer) -> tokenizers.Tokenizer:
    theirs = tokenizers.Tokenizer(BPE.from_file(str(config.vocab_file), str(config.merge_file)))
    theirs.pre_tokenizer = ByteLevel(add_prefix_space=False)
    theirs.decoder = ByteLevelDecoder()
    return theirs


@TOKENIZER_FILES.register("SPMTokenizer")
def _from_sentencepiece(config: TokenizerConfig, ours: Tokenizer) -> tokenizers.Tokenizer:
    """Converts a model of byte-pair encoding, as LLaMA's is; others encode otherwise then, and are refused by that."""
    with TemporaryDirectory() as folder, UntypedErrorsAs(partial(_no_conversion, config)):
        shutil.copyfile(str(config.vocab_file), Path(folder) / "tokenizer.model")
        theirs: tokenizers.Tokenizer = LlamaTokenizer.from_pretrained(folder).backend_tokenizer
    # As LLaMA's own tokenizer.json has it: a space before every text, also before one that begins with a space.
    theirs.normalizer = NormalizerSequence([Prepend(SPACE), Replace(" ", SPACE)])
    theirs.pre_tokenizer = None
    # What a text begins with is the architecture's to say.
    theirs.post_processor = None
    return theirs


def _no_conversion(config: TokenizerConfig, error: BaseException) -> DataError:
    return DataError(
        f"{config.vocab_file}: transformers cannot convert this SentencePiece model ({error}). Export without it "
        "(--no_save_tokenizer), and ship the tokenizer's own file."
    )


@TOKENIZER_FILES.register("CharLevelTokenizer")
def _bytes(config: TokenizerConfig, ours: Tokenizer) -> tokenizers.Tokenizer:
    """Builds a tokenizer where byte b is id b.

    The ids that no text produces have names, since every id of a tokenizer.json must.
    """
    vocabulary = {_byte_character(byte): byte for byte in range(2, 256)}
    vocabulary |= {END_OF_DOCUMENT: 0, PADDING: 1} | {f"<|unused{id_}|>": id_ for id_ in range(256, ours.vocab_size)}
    theirs = tokenizers.Tokenizer(BPE(vocab=vocabulary, merges=[]))
    theirs.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.decoder = ByteLevelDecoder()
    return theirs


def _byte_character(byte: int) -> str:
    """Returns the character by which byte-level BPE writes a byte (Radford et al. 2019).

    That is the byte itself where it is printable, else the next unused character above 255.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + sum(other not in printable for other in range(byte)))


def write_tokenizer(folder: Path, config: TokenizerConfig, model: ModelConfig) -> None:
    """Writes the configured tokenizer into `folder`, and sees that transformers reads it and encodes as ours does.

    Texts begin there as the prompts of `model` do here. Raises DataError when the tokenizer is missing or damaged, has
    no such form, or encodes samples otherwise there.
    """
    ours = build_tokenizer(config)
    prompts = PromptTokenizer(ours, model)
    if config.type not in TOKENIZER_FILES:
        raise DataError(
            f"tokenizer_type: {config.type} has no tokenizer.json form; known: {', '.join(TOKENIZER_FILES)}. Export "
            "without it (--no_save_tokenizer), and ship the tokenizer's own file."
        )
    library = TOKENIZER_FILES[config.type](config, ours)
    begin, end = (str(library.id_to_token(id_)) for id_ in (prompts.start, ours.eod))
    padding = PADDING if library.token_to_id(PADDING) is not None else end
    special = dict.fromkeys((begin, end, padding))
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if prompts.bos is not None:
        _begin_texts(library, begin, prompts.bos)
    PreTrainedTokenizerFast(
        tokenizer_object=library,
        bos_token=begin,
        eos_token=end,
        unk_token=end,
        pad_token=padding,
        model_max_length=model.max_position_embeddings,
        padding_side="left",
    ).save_pretrained(folder)
    _name_the_class_for_all_versions(folder / "tokenizer_config.json")
    _require_same(prompts, folder, config.type)


def _begin_texts(library: tokenizers.Tokenizer, begin: str, id_: int) -> None:
    """Lets texts begin with a token, which LlamaTokenizer adds itself where the file's own template does not."""
    if library.encode("").ids != [id_]:
        pair = f"{begin} $A {begin}:1 $B:1"
        template = TemplateProcessing(single=f"{begin} $A", pair=pair, special_tokens=[(begin, id_)])
        own = library.post_processor
        library.post_processor = template if own is None else Sequence([own, template])


def _name_the_class_for_all_versions(path: Path) -> None:
    """Replaces transformers 5's name of the class, which older versions do not know."""
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def _require_same(prompts: PromptTokenizer, folder: Path, kind: str) -> None:
    ours = prompts.tokenizer
    theirs = AutoTokenizer.from_pretrained(folder)
    for sample in SAMPLES:
        want, got = prompts.tokenize(sample), theirs(sample, verbose=False)["input_ids"]
        if want != got:
            raise DataError(
                f"{kind}: transformers encodes {sample!r} as {got[:8]}..., training did as {want[:8]}.... Export "
                "without it (--no_save_tokenizer), and ship the tokenizer's own file."
            )
    if (theirs.eos_token_id, len(theirs)) != (ours.eod, ours.vocab_size):
        raise DataError(
            f"{kind}: transformers has end of document {theirs.eos_token_id} among {len(theirs)} ids, training had "
            f"{ours.eod} among {ours.vocab_size}."
        )
