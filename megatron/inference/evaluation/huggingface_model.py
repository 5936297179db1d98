"""Loads any causal model of Hugging Face for the same tasks, through lm-eval's own adapter. Needs lm-eval.

Importing this module makes transformers know our TokenFormer, so that exports load without running their files.
"""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from lm_eval.models.huggingface import HFLM
from safetensors import SafetensorError

import megatron.hf  # noqa: F401 - registers TokenFormer
from megatron.checkpointing.store.safe_load import MALFORMED, unpickling_reason
from megatron.config.sections.evaluation import EvaluationConfig
from megatron.errors import ConfigError, UntypedErrorsAs
from megatron.io.hashing import folder_sha256

CPU_BATCH = 8
"""lm-eval's search for the largest batch would take minutes and all memory on a CPU."""


def load_hf_model(config: EvaluationConfig) -> HFLM:
    """Loads lm-eval's model for `hf_model`, in the format of its weights, on this rank's device.

    Raises ConfigError when it cannot be loaded. Nothing in its files runs, unless `eval_trust_remote_code` allows it.
    """
    cuda = torch.cuda.is_available()
    batch: int | str = config.batch_size
    if batch == "auto" and not cuda:
        batch = CPU_BATCH
    try:
        with UntypedErrorsAs(partial(_refusal, config)):
            return HFLM(
                pretrained=str(config.hf_model),
                dtype="auto",
                device="cuda" if cuda else "cpu",
                batch_size=batch,
                trust_remote_code=config.trust_remote_code,
            )
    except torch.OutOfMemoryError:
        raise
    # Configuration, weights and tokenizer are read by four libraries, and a value of a foreign type goes far in them.
    except (OSError, pickle.UnpicklingError, SafetensorError, StrictDataclassError, *MALFORMED) as error:
        raise _refusal(config, error) from error


def _refusal(config: EvaluationConfig, error: BaseException) -> ConfigError:
    words = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
    if isinstance(error, pickle.UnpicklingError):
        words = f"a file holds more than tensors and plain values ({unpickling_reason(error)}), and could run code"
    remedy = (
        " If it comes with code of its own that you trust, add `eval_trust_remote_code=true`."
        if "trust_remote_code" in str(error)
        else " Name a model of the hub or a folder with config.json, weights and tokenizer."
    )
    return ConfigError(f"eval_hf_model: {config.hf_model} cannot be loaded: {words}.{remedy}")


def describe_hf_model(config: EvaluationConfig, model: HFLM) -> dict[str, Any]:
    """Describes the model for the results file, with a hash of its folder's files or the hub's commit."""
    name = str(config.hf_model)
    folder = Path(name)
    commit = getattr(model.config, "_commit_hash", None)
    return {
        "name": folder.resolve().name if folder.is_dir() else name,
        "kind": "huggingface",
        "path": name,
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "sha256": folder_sha256(folder) if folder.is_dir() else None,
        "hub_commit": commit,
    }
