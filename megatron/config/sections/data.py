"""Datasets, their order, and the tokenizer that made them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron.config.bounds import NonNegative
from megatron.config.local_path import PathText
from megatron.config.section import Key, OneOf, Section
from megatron.registry import variant_names

DatasetFormat = Annotated[str, OneOf(lambda: [*variant_names("megatron.data.formats"), "infer"])]
TokenizerType = Literal["HFTokenizer", "GPT2BPETokenizer", "SPMTokenizer", "CharLevelTokenizer"]

REFUSED_WHEN_SMALL = "documents of less than one sample (seq_length + 1 tokens) are refused; NeoX repeats them"


class TokenizerConfig(Section):
    """The tokenizer: text to token ids."""

    type: Annotated[TokenizerType, Key("tokenizer_type")] = "GPT2BPETokenizer"
    """Kind of tokenizer."""

    vocab_file: PathText | None = None
    """tokenizer.json (HFTokenizer), vocab.json (GPT2BPETokenizer) or .model (SPMTokenizer); CharLevelTokenizer
    needs none."""

    merge_file: PathText | None = None
    """merges.txt (GPT2BPETokenizer only)."""


class DataConfig(Section):
    """Tokenized datasets: one that is split by documents, or separate ones, possibly blended."""

    data_path: PathText | None = None
    """Prefix of one .bin/.idx pair, split by `split`."""

    split: Annotated[str, Key(difference=REFUSED_WHEN_SMALL)] = "969, 30, 1"
    """Shares of documents for training, validation and test when data_path is given."""

    train_data_paths: Annotated[list[PathText] | None, Key(difference=REFUSED_WHEN_SMALL)] = None
    """Prefixes of the training datasets, blended by their weights."""

    valid_data_paths: Annotated[
        list[PathText] | None, Key(difference=f"may be left out with eval_iters: 0; {REFUSED_WHEN_SMALL}")
    ] = None
    """Prefixes of the validation datasets."""

    test_data_paths: Annotated[
        list[PathText] | None, Key(difference=f"may be left out: no final test; {REFUSED_WHEN_SMALL}")
    ] = None
    """Prefixes of the test datasets."""

    train_data_weights: list[NonNegative] | None = None
    """Weights of the training datasets; equal when unset."""

    valid_data_weights: list[NonNegative] | None = None
    """Weights of the validation datasets; equal when unset."""

    test_data_weights: list[NonNegative] | None = None
    """Weights of the test datasets; equal when unset."""

    train_label_data_paths: list[PathText] | None = None
    """Prefixes of the labels of train_data_paths, one for each: the token itself, or -100 where the loss does not
    count it."""

    valid_label_data_paths: list[PathText] | None = None
    """Prefixes of the labels of valid_data_paths."""

    test_label_data_paths: list[PathText] | None = None
    """Prefixes of the labels of test_data_paths."""

    weight_by_num_documents: Annotated[
        bool, Key(difference="NeoX divides by zero for a single dataset, whose weight is 1 here")
    ] = False
    """Weigh each dataset of train, valid and test_data_paths by its number of documents d, in place of the weights:
    with p = d / sum(d), in proportion to p ** weighted_sampler_alpha * (1 - p)."""

    weighted_sampler_alpha: float = Field(default=1.0, ge=0, le=100)
    """Exponent of weight_by_num_documents: below 1, it favours datasets of few documents."""

    preshuffled: Annotated[bool, Key(difference="not a NeoX key; Pythia's fork of it did so without one")] = False
    """Datasets hold rows of seq_length + 1 tokens, which are the samples in the order of training, as in Pythia's
    pre-shuffled datasets; each list of paths has one then."""

    impl: Annotated[DatasetFormat, Key("data_impl", difference="infer means mmap")] = "mmap"
    """Dataset format; both names mean NeoX's memory-mapped .bin/.idx files."""

    eod_mask_loss: Annotated[
        bool, Key(difference="the mean is over a step's counted tokens, not over each micro batch's")
    ] = False
    """Leave end-of-document tokens out of the loss."""

    num_workers: int = Field(default=2, ge=0, le=1024)
    """Loader processes per rank [processes]."""

    index_cache_dir: Annotated[PathText | None, Key(difference="not a NeoX key; there, beside the dataset")] = None
    """Folder for the sample indices, shared by all ranks of a machine; None keeps them beside the dataset."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer that made the datasets."""
