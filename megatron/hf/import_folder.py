"""A Hugging Face folder of TokenFormer or GPTNeoX to a checkpoint of ours, which has proved to compute the same."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from megatron.checkpointing.folder import read_checkpoint
from megatron.checkpointing.layout import layer_layouts
from megatron.checkpointing.name_map import our_names
from megatron.checkpointing.weights import read_weights
from megatron.checkpointing.weights_only import write_weights_only
from megatron.config.model import ModelConfig
from megatron.config.run import RunConfig
from megatron.data.tokenizer import build_tokenizer, padded_vocab_size
from megatron.errors import CheckpointError, ConfigError
from megatron.hf.check import fixed_tokens, logit_difference
from megatron.hf.mapping import HF_ARCHITECTURES, HFArchitecture, read_field
from megatron.hf.new_folder import new_folder
from megatron.hf.tensor_folder import TensorFolder, open_folder
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

    The numbers keep their format. Vocabulary rows that the configuration adds are zero. Each tensor of the folder is
    one parameter of the configured model, or it is an error. Where anything fails, no folder is left. Raises
    ConfigError when the configuration describes another model, CheckpointError for damaged, unsafe or unknown tensors,
    DataError without the configured tokenizer.
    """
    config = read_config(folder)
    architecture = HF_ARCHITECTURES[config.model_type]
    _require_same_model(folder, architecture.to_settings(config), run.model)
    vocab = _vocabulary(folder, config, run)
    tensors = open_folder(folder)
    with new_folder(output) as temporary:
        versions = {package: version(package) for package in ("torch", "transformers", "safetensors")}
        layers = _layers(folder, tensors, architecture, run.model, vocab)
        path = write_weights_only(temporary, layers, run, vocab, versions)
        tokens = fixed_tokens(min(vocab.actual, config.vocab_size), run.model.seq_length)
        with torch.device("meta"):
            model = build_local(run.model, vocab, seed=None)
        weights = {name: tensor.float() for name, tensor in read_weights(read_checkpoint(path)).items()}
        model.load_state_dict(weights, strict=True, assign=True)
        with torch.no_grad():
            logits = model.eval()(tokens)[..., : config.vocab_size]
        return logit_difference(folder, tokens, logits)


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


def _vocabulary(folder: Path, config: PretrainedConfig, run: RunConfig) -> VocabSize:
    tokenizer = build_tokenizer(run.data.tokenizer)
    vocab = VocabSize(tokenizer.vocab_size, padded_vocab_size(run.model, tokenizer.vocab_size))
    rows: int = config.vocab_size
    if rows < vocab.actual:
        raise ConfigError(
            f"{folder} has a vocabulary of {rows} rows, and the configured tokenizer {vocab.actual} ids. Configure the "
            "folder's tokenizer (`vocab_file`, `tokenizer_type`)."
        )
    if vocab.padded < rows:
        raise ConfigError(
            f"padded_vocab_size: {folder} has a vocabulary of {rows} rows, the configured model {vocab.padded}. Set "
            f"`padded_vocab_size: {rows}`."
        )
    if vocab.padded > rows and not run.model.mask_padded_vocab:
        raise ConfigError(
            f"padded_vocab_size: {folder} has a vocabulary of {rows} rows, the configured model {vocab.padded}; the "
            f"rows added would take part in the softmax. Set `padded_vocab_size: {rows}`, or `mask_padded_vocab: true`."
        )
    return vocab


def _layers(
    folder: Path, tensors: TensorFolder, architecture: HFArchitecture, model: ModelConfig, vocab: VocabSize
) -> Iterator[dict[str, Tensor]]:
    """The folder's weights by our global names, a layer at a time, the vocabulary padded with zeros."""
    layouts = layer_layouts(model, vocab)
    expected = [layout.global_name(name) for layout in layouts for name in layout.parameters]
    theirs = our_names(architecture.names, tensors.files, expected, str(folder))
    for layout in layouts:
        wanted = {layout.global_name(name): theirs[layout.global_name(name)] for name in layout.parameters}
        found = tensors.read(wanted.values())
        yield {ours: _finite(folder, name, _padded(ours, found[name], vocab)) for ours, name in wanted.items()}


def _padded(name: str, tensor: Tensor, vocab: VocabSize) -> Tensor:
    if name not in ("embedding.word_embeddings.weight", "head.weight"):
        return tensor
    return torch.cat((tensor, tensor.new_zeros(max(0, vocab.padded - len(tensor)), *tensor.shape[1:])))


def _finite(folder: Path, name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{folder}: {name} holds NaN or infinity.")
    return tensor
