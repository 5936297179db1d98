"""A run's YAML from a Hugging Face folder: the model as it is there, the rest to be filled in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.config.neox.keys.table import key_of
from megatron.config.yaml.yaml_files import write_new_yaml
from megatron.errors import CheckpointError, DataError
from megatron.hf.import_folder import folder_settings

HEADER = """# {folder} as a configuration of this trainer. The model is as its config.json says; the rest is a start.
# After tools/ckpts/convert_hf_to_neox.py, train on with `load: <output_dir>` and `finetune: true`.
"""

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")
TOKENIZER_KEYS = ("tokenizer_type", "vocab_file", "merge_file")

TO_FILL_IN: dict[str, Any] = {
    "train_iters": 1000,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 1.0e-5, "betas": [0.9, 0.95], "eps": 1.0e-8}},
    "weight_decay": 0.1,
    "gradient_clipping": 1.0,
    "lr_decay_style": "cosine",
    "warmup": 0.01,
    "min_lr": 1.0e-6,
    "precision": "bfloat16",
}


def write_config(folder: Path, path: Path, overrides: Sequence[str] = ()) -> None:
    """Writes the YAML of a folder's model, its tokenizer.json and a start for the rest to `path`.

    The tokenizer is that of `overrides`, `key=value`, where they name one. Raises CheckpointError for a folder that is
    none we know, DataError where neither names a tokenizer, ConfigError for a model that we cannot express, or when
    `path` exists.
    """
    config, settings = folder_settings(folder)
    for field in ("max_position_embeddings", "vocab_size"):
        if type(getattr(config, field)) is not int or not 0 < getattr(config, field) < 2**31:
            value = getattr(config, field)
            raise CheckpointError(f"{folder / 'config.json'}: {field} {value!r} is no size of a model.")
    settings |= {"seq_length": config.max_position_embeddings, "padded_vocab_size": config.vocab_size}
    settings |= {"make_vocab_size_divisible_by": math.gcd(config.vocab_size, 128)}
    keys = {key_of(f"model.{field}"): value for field, value in settings.items() if value is not None}
    # The one key that says the opposite of its field.
    keys["no_weight_tying"] = not keys["no_weight_tying"]
    keys |= {"tokenizer_type": "HFTokenizer"} | (_named_tokenizer(overrides) or _own_tokenizer(folder)) | TO_FILL_IN
    write_new_yaml(path, HEADER.format(folder=folder), keys)


def _named_tokenizer(overrides: Sequence[str]) -> dict[str, str]:
    words = dict(word.split("=", 1) for word in overrides if "=" in word)
    return {key: words[key] for key in TOKENIZER_KEYS if key in words}


def _own_tokenizer(folder: Path) -> dict[str, str]:
    """Names tokenizer.json, or what older folders hold in its place: GPT-2's two files, or LLaMA's tokenizer.model."""
    tokenizer, vocabulary, merges, pieces = (folder.absolute() / name for name in TOKENIZER_FILES)
    if not tokenizer.is_file() and vocabulary.is_file() and merges.is_file():
        return {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": str(vocabulary), "merge_file": str(merges)}
    if not tokenizer.is_file() and pieces.is_file():
        return {"tokenizer_type": "SPMTokenizer", "vocab_file": str(pieces)}
    if not tokenizer.is_file():
        raise DataError(
            f"{folder} holds no tokenizer.json. Copy its tokenizer there, or name one after the YAML, as in "
            "`--write-config new.yml tokenizer_type=SPMTokenizer vocab_file=tokenizer.model`."
        )
    return {"vocab_file": str(tokenizer)}
