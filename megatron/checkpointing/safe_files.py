"""Opens .pt files without running what is in them.

DeepSpeed unpickles its own files without restraint. So every file is first read here with torch's restricted unpickler
and a fixed list of types; a file that holds anything else is refused before DeepSpeed sees it.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from megatron.errors import CheckpointError


def _allowed_types() -> list[Any]:
    """What DeepSpeed's checkpoint files hold besides tensors and plain containers."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def load_tensors(path: Path) -> Any:
    """The content of a .pt file on the CPU, memory-mapped. Raises CheckpointError for a damaged or foreign one."""
    try:
        with torch.serialization.safe_globals(_allowed_types()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, and loading it could run code: it is refused. "
            f"({str(error).splitlines()[0]})"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. The checkpoint is damaged or incomplete.") from error


def check_folder(path: Path) -> None:
    """Open every .pt file of a checkpoint folder. Raises CheckpointError for the first that is not safe to load."""
    for file in sorted(path.glob("*.pt")):
        load_tensors(file)
