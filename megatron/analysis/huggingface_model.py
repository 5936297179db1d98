"""Loads a causal model of Hugging Face whose attention can be seen, and reads text by its own tokenizer."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

import megatron.hf  # noqa: F401 - registers TokenFormer
from megatron.checkpointing.store.safe_load import MALFORMED
from megatron.data.first_tokens import read_text
from megatron.errors import CheckpointError, UntypedErrorsAs
from megatron.mpu.process_group import local_device

UNREADABLE = (OSError, ImportError, pickle.UnpicklingError, SafetensorError, StrictDataclassError, *MALFORMED)
"""Errors that transformers and the libraries beneath raise for a folder that they cannot read."""


def load_huggingface(folder: Path) -> Any:
    """Loads a causal model with eager attention, in float32 and evaluation mode; no code of the folder is run.

    Raises CheckpointError when it cannot be loaded.
    """
    try:
        with UntypedErrorsAs(partial(_cannot_load, folder, "model")):
            model = AutoModelForCausalLM.from_pretrained(
                folder, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
            )
    except UNREADABLE as error:
        raise _cannot_load(folder, "model", error) from error
    return model.to(local_device()).eval()


def folder_tokens(folder: Path, text: Path) -> list[int]:
    """Returns the token ids of a text in UTF-8 by the folder's tokenizer, without special tokens.

    Raises CheckpointError when the folder has no tokenizer, DataError when the text cannot be read.
    """
    content = read_text(text)
    try:
        with UntypedErrorsAs(partial(_cannot_load, folder, "tokenizer")):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            # The text is longer than the model's context on purpose: it is cut afterwards.
            ids: list[int] = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    except UNREADABLE as error:
        raise _cannot_load(folder, "tokenizer", error) from error
    return ids


def _cannot_load(folder: Path, what: str, error: BaseException) -> CheckpointError:
    words = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
    return CheckpointError(
        f"{folder}: its {what} cannot be loaded: {words}. Name a Hugging Face folder of a causal language model, with "
        "config.json, weights and tokenizer."
    )
