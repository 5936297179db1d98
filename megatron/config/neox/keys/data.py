"""Keys that decide what the model reads."""

from __future__ import annotations

from typing import Any

from megatron.config.neox_entries import (
    Conversion,
    Converted,
    Flat,
    Inert,
    RefusedError,
    Rejected,
    TableEntry,
    absent_flag,
)
from megatron.config.yaml.problems import YamlValue


def _data_impl(value: YamlValue, flat: Flat) -> Converted:
    if value == "cached":
        raise RefusedError("the old cached format is not read; tokenize again, or use mmap for .bin/.idx files")
    return value


def _tokenizer_type(value: YamlValue, flat: Flat) -> Converted:
    if value == "HFGPT2Tokenizer":
        raise RefusedError("not implemented; use HFTokenizer with its tokenizer.json, or GPT2BPETokenizer")
    if value == "TiktokenTokenizer":
        raise RefusedError("not implemented; use HFTokenizer with a tokenizer.json of the same vocabulary")
    return value


_BOUNDARIES = "positions and attention that start anew at the boundaries of documents are not implemented"
_PREFERENCES = "preference training is not implemented"
_ONLINE = "only read with dataset_impl: online, which is refused"

DATA_KEYS: dict[str, TableEntry] = {
    "data_impl": Conversion(_data_impl),
    "reset_position_ids": absent_flag(_BOUNDARIES),
    "reset_attention_mask": absent_flag(_BOUNDARIES),
    "tokenizer_type": Conversion(_tokenizer_type),
    "use_shared_fs": Rejected(
        "indices are looked for beside the dataset, or in one folder per machine",
        "use index_cache_dir with a folder on each machine",
        (True,),
        bool,
    ),
    "mmap_warmup": Inert(bool, "only reads the dataset once to fill the page cache"),
    "dataset_impl": Rejected("only GPT datasets are implemented", harmless=("gpt2",), accepts=str),
    "pack_impl": Rejected("samples are always packed", harmless=("packed",), accepts=str),
    "allow_chopped": Inert(bool, "only read with a pack_impl other than packed, which is refused"),
    "short_seq_prob": Inert(float, "NeoX reads it nowhere: a left-over of BERT's data"),
    "online_dataserver_ips": Inert(Any, _ONLINE),
    "online_dataserver_ports": Inert(Any, _ONLINE),
    "curriculum_learning": Rejected("sequence-length curricula are not implemented"),
    "curriculum_seqlen": Rejected("sequence-length curricula are not implemented", harmless=(0,), accepts=int),
    "data_efficiency": Rejected("DeepSpeed's data-efficiency features are not supported"),
    "label_data_paths": Rejected("an earlier name of NeoX's", "use train_label_data_paths"),
}

DATA_KEYS |= {f"{part}_reward_data_paths": Rejected(_PREFERENCES) for part in ("train", "valid", "test")}
DATA_KEYS |= {
    f"{sign}_{part}_{kind}": Rejected(_PREFERENCES)
    for sign in ("pos", "neg")
    for part in ("train", "valid", "test")
    for kind in ("data_paths", "label_data_paths")
}
