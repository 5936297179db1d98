"""The tensors of a checkpoint that GPT-NeoX or the TokenFormer release wrote, in whichever files they lie.

layer_NN-model_TT-model_states.pt   one pipeline layer of one tensor-parallel rank
mp_rank_TT_model_states.pt          under "module", all layers of a rank whose model was no pipeline
pytorch_model.bin, *.safetensors    all layers, merged: the published weights, and what zero_to_fp32.py writes

A tensor is called `N.local` here: its layer in NeoX's list (0 embedding, 2 to L + 1 transformer layers, L + 3 final
norm, L + 4 head; 1 and L + 2 are functions) and its name in that layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from megatron.checkpointing.states.tensor_folder import (
    INDEX_FILES,
    SINGLE_FILES,
    TensorFolder,
    named_tensors,
    open_file,
    open_folder,
)
from megatron.checkpointing.store.checkpoint import CHECKPOINT_NAME, LATEST, read_latest
from megatron.checkpointing.store.manifest import MANIFEST_FILE
from megatron.checkpointing.store.safe_load import load_tensors
from megatron.errors import CheckpointError

LAYER_FILE = re.compile(r"layer_(\d{1,9})-model_(\d{1,9})-model_states\.pt")
RANK_FILE = re.compile(r"mp_rank_(\d{1,9})_model_states\.pt")
WHOLE_MODEL = re.compile(r"(?:sequential\.(?=\d)|(tied_modules\.embed\.)|(?=\d))(.+)")
"""Names in a whole model's state dictionary: of the plain module, and of a pipeline with its tied embedding."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor-parallel rank's part of a parameter, where it lies."""

    file: Path
    name: str
    """In the file."""
    read: Callable[[], Tensor]
    """Reads it; memory-mapped where the file allows that."""

    def __str__(self) -> str:
        return f"{self.file.name}: {self.name}"


@dataclass(frozen=True)
class NeoxFiles:
    """A checkpoint's tensors."""

    path: Path
    """The file, or the folder that holds the files."""
    tensors: dict[str, list[StoredTensor]]
    """By name `N.local`: the parts of all tensor-parallel ranks, in their order."""

    def describe(self, name: str) -> str:
        """Describes a tensor in an error's words; it may be one that is missing."""
        if name in self.tensors:
            return str(self.tensors[name][0])
        layer, _, local = name.partition(".")
        return f"{local} of layer {layer}"


def open_neox(path: Path, *, allow_unsafe: bool = False) -> NeoxFiles:
    """Finds the tensors of a file, of a global_stepN folder, or of a run's folder, whose `latest` names one.

    Raises CheckpointError when there are none, a rank's file is missing, or a file is damaged or could run code.
    """
    path = _located(path)
    names = [] if path.is_file() else sorted(file.name for file in path.iterdir())
    if path.suffix == ".safetensors" and path.is_file():
        ranks = [_whole_model(_of_folder(open_file(path)))]
    elif path.is_file():
        ranks = [_state_dictionary(path, allow_unsafe)]
    elif any(LAYER_FILE.fullmatch(name) for name in names):
        ranks = _layer_files(path, [match for name in names if (match := LAYER_FILE.fullmatch(name))], allow_unsafe)
    elif any(RANK_FILE.fullmatch(name) for name in names):
        size = sum(RANK_FILE.fullmatch(name) is not None for name in names)
        ranks = [_state_dictionary(path / f"mp_rank_{rank:02d}_model_states.pt", allow_unsafe) for rank in range(size)]
    elif {*names} & {*SINGLE_FILES, *INDEX_FILES}:
        ranks = [_whole_model(_of_folder(open_folder(path, allow_unsafe=allow_unsafe)))]
    else:
        raise CheckpointError(
            f"{path} holds no weights: neither layer_*-model_*-model_states.pt nor mp_rank_*_model_states.pt nor "
            "pytorch_model.bin is there. Name a global_stepN folder, a run's folder, or a .bin file."
        )
    for rank, tensors in enumerate(ranks):
        differing = sorted(tensors.keys() ^ ranks[0].keys())
        if differing:
            raise CheckpointError(f"{path}: tensor-parallel ranks 0 and {rank} do not both have {differing[0]}.")
    return NeoxFiles(path, {name: [tensors[name] for tensors in ranks] for name in ranks[0]})


def _located(path: Path) -> Path:
    """Returns the path of the file, or of the folder that is to hold the files."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist. Name a global_stepN folder, a run's folder, or a .bin file.")
    latest = read_latest(path) if path.is_dir() else None
    if latest is not None:
        if not CHECKPOINT_NAME.fullmatch(latest) or not (path / latest).is_dir():
            raise CheckpointError(f"{path / LATEST} names {latest!r}, which is no checkpoint beside it.")
        path /= latest
    if (path / MANIFEST_FILE).is_file():
        raise CheckpointError(f"{path} is a checkpoint of this trainer: give it as `load`, it needs no import.")
    return path


def _layer_files(folder: Path, matches: list[re.Match[str]], allow_unsafe: bool) -> list[dict[str, StoredTensor]]:
    size = 1 + max(int(match[2]) for match in matches)
    if size > len(matches):
        raise CheckpointError(
            f"{folder} holds {len(matches)} of the files of {size:,} tensor-parallel ranks. Copy all."
        )
    ranks: list[dict[str, StoredTensor]] = [{} for _ in range(size)]
    for layer in sorted({int(match[1]) for match in matches}):
        for rank, found in enumerate(ranks):
            file = folder / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
            tensors = _of_file(file, load_tensors(file, allow_unsafe=allow_unsafe))
            found |= {f"{layer}.{stored.name}": stored for stored in tensors}
    return ranks


def _state_dictionary(file: Path, allow_unsafe: bool) -> dict[str, StoredTensor]:
    """Reads a file of all layers: a state dictionary, or what DeepSpeed saves, with one under "module"."""
    content = load_tensors(file, allow_unsafe=allow_unsafe)
    if isinstance(content, dict) and "module" in content:
        content = content["module"]
        if content is None or content == {}:
            raise CheckpointError(
                f"{file} holds no weights: a pipeline's are in layer_*-model_*-model_states.pt beside it. Copy these."
            )
    return _whole_model(_of_file(file, content))


def _whole_model(tensors: Iterable[StoredTensor]) -> dict[str, StoredTensor]:
    found = {}
    for stored in tensors:
        match = WHOLE_MODEL.fullmatch(stored.name)
        name = stored.name if match is None else f"0.{match[2]}" if match[1] else match[2]
        found[name] = stored
    return found


def _of_file(file: Path, content: object) -> Iterator[StoredTensor]:
    for name, tensor in named_tensors(content, file).items():
        yield StoredTensor(file, name, partial(_itself, tensor))


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _of_folder(folder: TensorFolder) -> Iterator[StoredTensor]:
    for name, file in folder.files.items():
        yield StoredTensor(file, name, partial(_read, folder, name))


def _read(folder: TensorFolder, name: str) -> Tensor:
    return folder.read([name])[name]
