"""A Hugging Face folder of a known model to a checkpoint of ours, which has proved to compute the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from megatron.checkpointing.convert.imported_weights import (
    VOCABULARY,
    imported_vocabulary,
    require_finite,
    with_configured_rows,
)
from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.checkpointing.states.name_map import NameMap, our_names
from megatron.checkpointing.states.parameter_layout import LayerLayout, ParallelSizes, layer_layouts
from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.states.tensor_folder import TensorFolder, open_folder
from megatron.checkpointing.states.write_states import RunHeader, write_states
from megatron.checkpointing.store.checkpoint import read_checkpoint
from megatron.config.architecture import ARCHITECTURES
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.run_config import RunConfig
from megatron.errors import CheckpointError, ConfigError
from megatron.hf.hf_architecture import HF_ARCHITECTURES, HFArchitecture, read_field
from megatron.hf.logit_check import fixed_tokens, logit_difference
from megatron.io.durable import new_folder
from megatron.io.json_files import describe_read_error, read_json_object
from megatron.model.causal_lm import VocabSize, build_local

LIBRARY_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError),
    # Of configurations that check the types of their fields, such as GPT-2's; a class of its own.
    StrictDataclassError,
)
FREE_SETTINGS = frozenset({"max_position_embeddings", "attention_dropout", "hidden_dropout", "init_method_std"})
"""What a folder's configuration says and the importing run may change; learned positions have their number."""


def read_config(folder: Path) -> PretrainedConfig:
    """Reads the folder's configuration; code in the folder is not run.

    Raises CheckpointError when it is none we know.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no config.json: it is not a Hugging Face folder.")
    try:
        model_type = read_json_object(path).get("model_type")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {describe_read_error(error)}. Copy it again.") from error
    if not isinstance(model_type, str) or model_type not in HF_ARCHITECTURES:
        known = ", ".join(HF_ARCHITECTURES)
        raise CheckpointError(f"{folder}: model_type {model_type!r} cannot be imported; known: {known}.")
    with _library_errors(path):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # Not one of the fields that become ours, whose types the model's section checks.
    rows = config.vocab_size
    if not isinstance(rows, int) or rows < 1:
        raise CheckpointError(f"{path}: vocab_size: {rows!r}; expected a whole number above 0. Copy it again.")
    return config


def folder_settings(folder: Path) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Reads the folder's configuration, and the fields of ModelConfig that it decides, by dotted path.

    Raises CheckpointError as `read_config` does, ConfigError for a model that we cannot express.
    """
    config, path = read_config(folder), folder / "config.json"
    try:
        with _library_errors(path):
            return config, HF_ARCHITECTURES[config.model_type].to_settings(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def folder_model(folder: Path, **fields: Any) -> ModelConfig:
    """Returns the folder's model, with the values of `fields` that its configuration does not decide.

    Its samples are as long as its positions. Raises what `folder_settings` raises.
    """
    config, settings = folder_settings(folder)
    values = {"seq_length": config.max_position_embeddings} | fields
    defaults = dict(ARCHITECTURES[settings["architecture"]].defaults)
    return _model_with(values, defaults | settings, folder, CheckpointError)


def _model_with(
    values: dict[str, Any], settings: dict[str, Any], folder: Path, kind: type[CheckpointError | ConfigError]
) -> ModelConfig:
    """Returns the model of `values`, in which a folder's settings, by dotted path, take their places.

    Raises a `kind` for a value that our configuration does not allow.
    """
    for path, value in settings.items():
        *sections, name = path.split(".")
        place = values
        for section in sections:
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
        place[name] = value
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise kind(f"{folder / 'config.json'}: {where}: {first['msg']}. Copy it again.") from error


@contextmanager
def _library_errors(path: Path) -> Iterator[None]:
    """Raises CheckpointError for what transformers and its classes raise where a field is of a foreign type."""
    try:
        yield
    except LIBRARY_ERRORS as error:
        reason = " ".join((str(error) or repr(error)).split("\n")[:2])
        raise CheckpointError(f"{path} cannot be used: {type(error).__name__}: {reason}. Copy it again.") from error


def import_folder(folder: Path, run: RunConfig, output: Path) -> float:
    """Writes `output`/global_step0 from a Hugging Face folder; returns the largest difference of the models' logits.

    Where anything fails, no folder is left. Raises CheckpointError when the two compute something else, and what
    `read_hf_states` raises.
    """
    vocab = hf_vocabulary(folder, run)
    versions = {package: version(package) for package in ("torch", "transformers", "safetensors")}
    with new_folder(output) as temporary:
        header = RunHeader.new(vocab.actual, versions)
        path = write_states(read_hf_states(folder, run), run, ParallelSizes(), temporary, header)
        tokens = fixed_tokens(vocab.actual, run.model.seq_length)
        with torch.device("meta"):
            model = build_local(run.model, vocab, seed=None)
        weights = {name: tensor.float() for name, tensor in read_weights(read_checkpoint(path)).items()}
        model.load_state_dict(weights, strict=True, assign=True)
        with torch.no_grad():
            logits = model.eval()(tokens)
        config = read_config(folder)
        rows, names = min(vocab.padded, config.vocab_size), HF_ARCHITECTURES[config.model_type].names
        with _library_errors(folder):
            return logit_difference(folder, tokens, logits, rows, names.without_weights)


def hf_vocabulary(folder: Path, run: RunConfig) -> VocabSize:
    """Returns the vocabulary that a folder's weights are given in the configured run.

    Raises ConfigError when the configuration describes another model, or its vocabulary does not fit; DataError without
    the configured tokenizer.
    """
    config, settings = folder_settings(folder)
    _require_same_model(folder, settings, run.model)
    return imported_vocabulary(config.vocab_size, run, str(folder))


class FolderReader:
    """Reads the layers of a Hugging Face folder by name, as weights alone of the configured model.

    The numbers keep their format. With `mask_padded_vocab`, padding rows of the vocabulary are cut off, or added as
    zeros, as the configuration asks. Each tensor of the folder is one parameter of the configured model, or it is an
    error. Raises ConfigError when the configuration describes another model, CheckpointError for damaged, unsafe or
    unknown tensors, DataError without the configured tokenizer.
    """

    def __init__(self, folder: Path, run: RunConfig) -> None:
        self.folder = folder
        self.vocab = hf_vocabulary(folder, run)
        self._model = run.model
        self._architecture = architecture = HF_ARCHITECTURES[read_config(folder).model_type]
        self._tensors = tensors = open_folder(folder, allow_unsafe=run.checkpoint.allow_unsafe_load)
        if run.model.num_layers > len(tensors.files):
            raise CheckpointError(
                f"{folder}: {len(tensors.files)} tensors cannot be the {run.model.num_layers:,} layers of its "
                "config.json."
            )
        self._layouts = {layout.name: layout for layout in layer_layouts(run.model, self.vocab)}
        self._shapes = {name: _their_shapes(layout, architecture, run.model) for name, layout in self._layouts.items()}
        files = _without_tied_head(folder, tensors, architecture.names) if run.model.tie_embeddings else tensors.files
        expected = chain.from_iterable(self._shapes.values())
        self._theirs = our_names(architecture.names, files, expected, str(folder))

    @property
    def names(self) -> list[str]:
        """Returns the names of all layers in the order of the pipeline."""
        return list(self._layouts)

    def read(self, layer: str) -> LayerState:
        """Returns the layer of a name, such as `layers.3`."""
        folder, layout, shapes = self.folder, self._layouts[layer], self._shapes[layer]
        found = self._tensors.read(self._theirs[name] for name in shapes)
        named = {}
        for name, shape in shapes.items():
            tensor = found[self._theirs[name]]
            require_finite(tensor, f"{folder}: {self._theirs[name]}")
            try:
                named[name] = _with_rows(name, tensor, layout, self.vocab)
            except CheckpointError as error:
                raise CheckpointError(f"{folder}: {error}") from error
            if named[name].shape != shape:
                raise CheckpointError(
                    f"{folder}: {self._theirs[name]} has shape {tuple(tensor.shape)}; the configuration describes "
                    f"{tuple(shape)}."
                )
        try:
            ours = self._architecture.to_our_tensors(self._model, named)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        weights = {local: ParameterState(ours[layout.global_name(local)]) for local in layout.parameters}
        return LayerState(layout.name, weights)


def read_hf_states(folder: Path, run: RunConfig) -> Iterator[LayerState]:
    """Yields the layers of a Hugging Face folder in the order of the pipeline, a layer in memory at a time.

    Raises what FolderReader does.
    """
    reader = FolderReader(folder, run)
    yield from map(reader.read, reader.names)


def model_of_folder(folder: Path, model: ModelConfig) -> ModelConfig:
    """Returns a folder's own model, with the values of `model` that a folder does not decide.

    Raises what `folder_settings` does, and ConfigError for a value that our configuration does not allow.
    """
    _, settings = folder_settings(folder)
    return _model_with(model.model_dump(), settings, folder, ConfigError)


def _their_shapes(layout: LayerLayout, architecture: HFArchitecture, model: ModelConfig) -> dict[str, torch.Size]:
    """Returns the shapes of a layer's tensors as the folder has them, by our global name."""
    specs = layout.parameters.items()
    ours = {layout.global_name(local): torch.empty(spec.full_shape, device="meta") for local, spec in specs}
    return {name: tensor.shape for name, tensor in architecture.to_their_tensors(model, ours).items()}


def _with_rows(name: str, tensor: Tensor, layout: LayerLayout, vocab: VocabSize) -> Tensor:
    if name not in VOCABULARY:
        return tensor
    return with_configured_rows(name, tensor, layout.parameters[name.removeprefix(f"{layout.name}.")], vocab)


def _without_tied_head(folder: Path, tensors: TensorFolder, names: NameMap) -> list[str]:
    """Lists the tensors of a folder whose head is tied, but for the copy of the embedding that some save for it.

    Raises CheckpointError when it is no copy.
    """
    spelled: dict[str | None, str] = {}
    for name in tensors.files:
        with suppress(KeyError):
            spelled[names.to_ours(name)] = name
    copy, embedding = spelled.get("head.weight"), spelled.get("embedding.word_embeddings.weight")
    if copy is None or embedding is None:
        return list(tensors.files)
    both = tensors.read([copy, embedding])
    if not torch.equal(both[copy], both[embedding]):
        raise CheckpointError(
            f"{folder}: {copy} differs from {embedding}, to which config.json ties it. Copy the folder again, or set "
            "tie_word_embeddings to false there."
        )
    return [name for name in tensors.files if name != copy]


def _require_same_model(folder: Path, settings: dict[str, Any], model: ModelConfig) -> None:
    norms = {model.norm, model.final_norm or model.norm}
    free = FREE_SETTINGS if "rmsnorm" in norms else FREE_SETTINGS | {"rms_norm_epsilon"}
    if model.pos_emb == "learned":
        free -= {"max_position_embeddings"}
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
