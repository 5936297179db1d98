"""Comparison of checkpoints, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def tensors(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors in nested dictionaries and lists, by their path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: tensor for key, item in items for name, tensor in tensors(item, f"{path}/{key}").items()}


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    """Bitwise equal weights and optimizer states, file by file."""
    files = sorted(file.name for file in ours.glob("*.pt"))
    assert files == sorted(file.name for file in theirs.glob("*.pt"))
    compared = 0
    for file in files:
        # Files of the tests' own making; the optimizer's holds DeepSpeed's LossScaler.
        left = tensors(torch.load(ours / file, weights_only=False))
        right = tensors(torch.load(theirs / file, weights_only=False))
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), (file, name)
            compared += tensor.numel()
    assert compared > 10_000
