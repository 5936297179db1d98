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


def load_tensors(path: Path, *, allow_unsafe: bool = False, mmap: bool = True) -> Any:
    """The content of a .pt file on the CPU, memory-mapped or read.

    Raises CheckpointError for a damaged file, and for one that holds anything but tensors, plain values and the types
    that DeepSpeed writes, unless `allow_unsafe`: then such a file may run any code.
    """
    try:
        with torch.serialization.safe_globals(_allowed_types()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if allow_unsafe:
            return torch.load(path, map_location="cpu", weights_only=False, mmap=mmap)
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, and loading it could run code: it is refused. If you "
            f"trust who wrote it, set `allow_unsafe_load: true`. ({str(error).splitlines()[0]})"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. The checkpoint is damaged or incomplete.") from error
