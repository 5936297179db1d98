"""Opens .pt files without running what is in them.

DeepSpeed unpickles its own files without restraint. So every file is first read here with torch's restricted unpickler
and a fixed list of types; a file that holds anything else is refused before DeepSpeed sees it.
"""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.errors import CheckpointError

NUMPY_ARRAY_MAKER = np.arange(0).__reduce__()[0]
"""What NumPy's pickles call to make an empty array, whose memory they then fill."""


def _allowed_types() -> list[Any]:
    """Lists the types that DeepSpeed's and GPT-NeoX's files hold besides tensors and plain containers.

    GPT-NeoX saves NumPy's random state, which is an array of 32-bit integers.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [
        DynamicLossScaler,
        LossScaler,
        ZeroStageEnum,
        fragment_address,
        argparse.Namespace,
        np.ndarray,
        np.dtype,
        type(np.dtype(np.uint32)),
        # The module had another name before NumPy 2.
        (NUMPY_ARRAY_MAKER, "numpy.core.multiarray._reconstruct"),
        (NUMPY_ARRAY_MAKER, "numpy._core.multiarray._reconstruct"),
    ]


def load_tensors(path: Path, *, allow_unsafe: bool | None = None, mmap: bool = True) -> Any:
    """Reads a .pt file on the CPU, memory-mapped or into memory.

    Raises CheckpointError for a damaged file, and for one that holds anything but tensors, plain values and the types
    that DeepSpeed and GPT-NeoX write, unless `allow_unsafe`: then such a file may run any code. None is False where
    the user is offered no choice.
    """
    try:
        with torch.serialization.safe_globals(_allowed_types()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if allow_unsafe:
            return _load_trusted(path, mmap)
        remedy = (
            "Training writes no such file: load another checkpoint, or restore this one."
            if allow_unsafe is None
            else "If you trust who wrote it, set `allow_unsafe_load: true`."
        )
        raise CheckpointError(
            f"{path} holds more than tensors and plain values ({_reason(error)}), and loading it could run code: it is "
            f"refused. {remedy}"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. The checkpoint is damaged or incomplete.") from error


def _load_trusted(path: Path, mmap: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=mmap)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{path} needs code that is not installed here: {error}. Install it, or save the tensors alone where it is."
        ) from error
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. The checkpoint is damaged or incomplete.") from error


def _reason(error: pickle.UnpicklingError) -> str:
    """Returns the class or function that torch met, where it names one."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    return named.group(1) if named else str(error).splitlines()[0]
