"""Tensors of a folder as Hugging Face and DeepSpeed's zero_to_fp32 lay them out: safetensors or .bin, perhaps sharded.

Written as safetensors. Reading runs no code that may be in a .bin file, unless that is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron.checkpointing.store.manifest import MANIFEST_FILE, describe_problem, is_file_name
from megatron.checkpointing.store.safe_load import load_tensors
from megatron.errors import CheckpointError
from megatron.io.json_files import read_json_object

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = tuple(f"{name}.index.json" for name in SINGLE_FILES)


def is_hf_folder(path: Path) -> bool:
    """Tells whether a folder is of Hugging Face's form rather than a checkpoint of ours, which has a manifest."""
    return (path / "config.json").is_file() and not (path / MANIFEST_FILE).is_file()


def write_shards(folder: Path, layers: Iterable[Mapping[str, Tensor]], max_shard_bytes: int) -> None:
    """Writes tensors as model.safetensors, or as shards of at most `max_shard_bytes` with their index.

    A layer is never split over shards, so one that is larger makes a shard of its own; no more than a shard is in
    memory. Names and index are those of transformers.
    """
    shards: list[list[str]] = []
    total_size = 0
    for number, shard in enumerate(_grouped(layers, max_shard_bytes)):
        save_file(shard, _unnamed(folder, number), metadata={"format": "pt"})
        # safetensors lets the owner alone read it; who may read the folder may read what is in it.
        _unnamed(folder, number).chmod(folder.stat().st_mode & 0o666)
        shards.append(list(shard))
        total_size += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        _unnamed(folder, 0).rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _unnamed(folder, number).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _unnamed(folder: Path, number: int) -> Path:
    """Returns the path of a shard before the number of shards is known, which is part of its name."""
    return folder / f"shard-{number}.safetensors"


def _grouped(layers: Iterable[Mapping[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for layer in layers:
        together = sum(tensor.nbytes for tensor in (*shard.values(), *layer.values()))
        if shard and together > max_bytes:
            yield shard
            shard = {}
        shard |= layer
    yield shard


@dataclass(frozen=True)
class TensorFolder:
    """Places of a folder's tensors."""

    files: dict[str, Path]
    """Tensor name to the file that holds it."""
    allow_unsafe: bool
    """Read .bin files that hold more than tensors, which may run any code."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Reads tensors by name to the CPU. Raises CheckpointError for a damaged or unsafe file."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        return {
            name: tensor
            for file, wanted in by_file.items()
            for name, tensor in _read_file(file, wanted, self.allow_unsafe).items()
        }


def open_folder(folder: Path, *, allow_unsafe: bool = False) -> TensorFolder:
    """Finds the tensors of a folder. Raises CheckpointError when there are none, or a file is missing or damaged."""
    for name in INDEX_FILES:
        if (folder / name).is_file():
            return TensorFolder(_indexed_files(folder / name, allow_unsafe), allow_unsafe)
    for name in SINGLE_FILES:
        if (folder / name).is_file():
            return open_file(folder / name, allow_unsafe=allow_unsafe)
    raise CheckpointError(f"{folder} holds no weights: none of {', '.join((*SINGLE_FILES, *INDEX_FILES))} is there.")


def open_file(file: Path, *, allow_unsafe: bool = False) -> TensorFolder:
    """Finds the tensors of one file that holds all of them. Raises CheckpointError when it is damaged or unsafe."""
    return TensorFolder(dict.fromkeys(_tensor_names(file, allow_unsafe), file), allow_unsafe)


def _indexed_files(index: Path, allow_unsafe: bool) -> dict[str, Path]:
    try:
        weight_map = read_json_object(index).get("weight_map")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index} cannot be read: {describe_problem(error)}.") from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no `weight_map` of tensor names to files. Copy it again.")
    for file in set(weight_map.values()):
        if not is_file_name(file):
            raise CheckpointError(f"{index} names {file!r}, which is not a file of its folder.")
        there = set(_tensor_names(index.parent / file, allow_unsafe))
        listed = {name for name in weight_map if weight_map[name] == file}
        if there != listed:
            raise CheckpointError(f"{index.parent / file} and {index.name} disagree about {sorted(there ^ listed)[0]}.")
    return {name: index.parent / file for name, file in weight_map.items()}


def _tensor_names(file: Path, allow_unsafe: bool) -> list[str]:
    if file.suffix != ".safetensors":
        return list(_read_bin(file, allow_unsafe))
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from error


def _read_file(file: Path, names: Iterable[str], allow_unsafe: bool) -> dict[str, Tensor]:
    if file.suffix != ".safetensors":
        content = _read_bin(file, allow_unsafe)
        return {name: content[name] for name in names}
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from error


def _read_bin(file: Path, allow_unsafe: bool) -> dict[str, Tensor]:
    """Reads a pickle of tensors, memory-mapped."""
    return named_tensors(load_tensors(file, allow_unsafe=allow_unsafe), file)


def named_tensors(content: object, file: Path) -> dict[str, Tensor]:
    """Returns `content`, which was read from `file`.

    Raises CheckpointError when it is no dictionary of tensors that lie in memory, one number after the other: a file of
    some bytes may claim a view of any size.
    """
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{file} does not hold named tensors.")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{file} does not hold named tensors: {name} is none.")
        if not _is_stored(value):
            raise CheckpointError(f"{file}: {name} is no tensor whose numbers are all in the file.")
    return content


def _is_stored(tensor: Tensor) -> bool:
    """Tells whether each number of a tensor has a place of its own in memory."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return dense and tensor.nbytes <= tensor.untyped_storage().nbytes()


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} cannot be read: {error}. Copy it again.")
