"""A Hugging Face folder of TokenFormer or GPTNeoX to a checkpoint of ours, which has proved to compute the same."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from megatron.checkpointing.convert.imported_weights import imported_vocabulary, require_finite, with_configured_rows
from megatron.checkpointing.states.name_map import our_names
from megatron.checkpointing.states.parameter_layout import layer_layouts
from megatron.checkpointing.states.tensor_folder import TensorFolder, open_folder
from megatron.checkpointing.states.weights import read_weights
from megatron.checkpointing.states.weights_only import write_weights_only
from megatron.checkpointing.store.checkpoint import read_checkpoint
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.run_config import RunConfig
from megatron.errors import CheckpointError, ConfigError
from megatron.hf.hf_architecture import HF_ARCHITECTURES, HFArchitecture, read_field
from megatron.hf.logit_check import fixed_tokens, logit_difference
from megatron.io.durable import new_folder
from megatron.model.causal_lm import VocabSize, build_local

FREE_SETTINGS = frozenset({"max_position_embeddings", "attention_dropout", "hidden_dropout", "init_method_std"})
"""What a folder's configuration says and the importing run may change."""


def read_config(folder: Path) -> PretrainedConfig:
    """The folder's configuration; code in the folder is not run. Raises CheckpointError when it is none we know."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json: it is not a Hugging Face folder.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if config.model_type not in HF_ARCHITECTURES:
        known = ", ".join(HF_ARCHITECTURES)
        raise CheckpointError(f"{folder}: model_type {config.model_type!r} cannot be imported; known: {known}.")
    return config


def import_folder(folder: Path, run: RunConfig, output: Path) -> float:
    """Write `output`/global_step0 from a Hugging Face folder; the largest difference between the two models' logits.

    The numbers keep their format. With `mask_padded_vocab`, padding rows of the vocabulary are cut off, or added as
    zeros, as the configuration asks. Each tensor of the folder is one parameter of the configured model, or it is an
    error. Where anything fails, no folder is left. Raises ConfigError when the configuration describes another model,
    CheckpointError for damaged, unsafe or unknown tensors, DataError without the configured tokenizer.
    """
    config = read_config(folder)
    architecture = HF_ARCHITECTURES[config.model_type]
    _require_same_model(folder, architecture.to_settings(config), run.model)
    vocab = imported_vocabulary(config.vocab_size, run, str(folder))
    tensors = open_folder(folder, allow_unsafe=run.checkpoint.allow_unsafe_load)
    with new_folder(output) as temporary:
        versions = {package: version(package) for package in ("torch", "transformers", "safetensors")}
        layers = _layers(folder, tensors, architecture, run.model, vocab)
        path = write_weights_only(temporary, layers, run, vocab, versions)
        tokens = fixed_tokens(vocab.actual, run.model.seq_length)
        with torch.device("meta"):
            model = build_local(run.model, vocab, seed=None)
        weights = {name: tensor.float() for name, tensor in read_weights(read_checkpoint(path)).items()}
        model.load_state_dict(weights, strict=True, assign=True)
        with torch.no_grad():
            logits = model.eval()(tokens)
        return logit_difference(folder, tokens, logits, rows=min(vocab.padded, config.vocab_size))


def _require_same_model(folder: Path, settings: dict[str, Any], model: ModelConfig) -> None:
    norms = {model.norm, model.final_norm or model.norm}
    free = FREE_SETTINGS if "rmsnorm" in norms else FREE_SETTINGS | {"rms_norm_epsilon"}
    ours = {path: _setting(model, path) for path in settings.keys() - free}
    differences = [
        f"{path}: folder {settings[path]!r}, configuration {ours[path]!r}"
        for path in sorted(ours)
        if ours[path] != settings[path]
    ]
    if differences:
        raise ConfigError(
            f"{folder} holds another model than the configuration describes: {'; '.join(differences)}. Correct the "
            "configuration, or have it written: --write-config."
        )


def _setting(model: ModelConfig, path: str) -> Any:
    if path == "final_norm":
        return model.final_norm or model.norm
    if path.startswith("param_tokens.") and model.param_tokens is None:
        return None
    return read_field(model, path)


def _layers(
    folder: Path, tensors: TensorFolder, architecture: HFArchitecture, model: ModelConfig, vocab: VocabSize
) -> Iterator[dict[str, Tensor]]:
    """The folder's weights by our global names, a layer at a time, with the configured vocabulary rows."""
    layouts = layer_layouts(model, vocab)
    expected = [layout.global_name(name) for layout in layouts for name in layout.parameters]
    theirs = our_names(architecture.names, tensors.files, expected, str(folder))
    for layout in layouts:
        wanted = {name: theirs[layout.global_name(name)] for name in layout.parameters}
        found = tensors.read(wanted.values())
        for name, tensor in found.items():
            require_finite(tensor, f"{folder}: {name}")
        yield {
            layout.global_name(ours): with_configured_rows(
                layout.global_name(ours), found[name], layout.parameters[ours], vocab
            )
            for ours, name in wanted.items()
        }
