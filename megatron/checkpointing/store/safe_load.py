"""Opens .pt files without running what is in them.

DeepSpeed unpickles its own files without restraint. So every file is first read here with torch's restricted unpickler
and a fixed list of types; a file that holds anything else is refused before DeepSpeed sees it.
"""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from megatron.errors import CheckpointError

NUMPY_ARRAY_MAKER = np.arange(0).__reduce__()[0]
"""What NumPy's pickles call to make an empty array, whose memory they then fill."""

MALFORMED = (
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    BufferError,
    ImportError,
    struct.error,
    zipfile.BadZipFile,
)
"""Errors of torch's reader on a malformed file, beside UnpicklingError and OSError.

It interprets pickle's instructions with a stack and a memo that it does not check, and calls the constructors of the
allowed types with whatever arguments it finds there: each may raise what a wrong operand or argument makes it raise.
"""

ZIP_MAGIC = b"PK\x03\x04"


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
    """Reads a .pt file on the CPU, memory-mapped or into memory; one in torch's format before 1.6 always into memory.

    Raises CheckpointError for a file that is damaged or gone, and for one that holds anything but tensors, plain values
    and the types that DeepSpeed and GPT-NeoX write, unless `allow_unsafe`: then such a file may run any code. None is
    False where the user is offered no choice.
    """
    try:
        mmap = _is_plain_archive(path) and mmap
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
            f"{path} holds more than tensors and plain values ({unpickling_reason(error)}), and loading it could run "
            f"code: it is refused. {remedy}"
        ) from error
    except (OSError, *MALFORMED) as error:
        raise unreadable_tensors(path, error) from error


def unreadable_tensors(path: Path, error: BaseException) -> CheckpointError:
    """Returns the error about a file of tensors whose reading has raised `error`: it is gone, out of reach, or damaged.

    Gone is what retention makes of an old checkpoint while another process reads it, and no damage.
    """
    if isinstance(error, FileNotFoundError) or not path.exists():
        return CheckpointError(
            f"{path} is not there. If it was a moment ago, its run has removed the checkpoint meanwhile, as "
            "`keep_last_n_checkpoints` asks: load a newer one. Otherwise restore it."
        )
    if isinstance(error, OSError) and error.strerror:
        return CheckpointError(f"{path} cannot be read ({error.strerror}).")
    words = (str(error) or repr(error)).splitlines()[0]
    return CheckpointError(f"{path} cannot be read: {type(error).__name__}: {words}. It is damaged or incomplete.")


def _is_plain_archive(path: Path) -> bool:
    """Tells whether a file is an archive of torch's present format, rather than of that before 1.6.

    Raises zipfile.BadZipFile for an archive that torch.save does not write: its reader would unpack any compression
    into memory, and takes the last of two entries of the same name, where other readers take the first.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
            return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    seen: set[str] = set()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise zipfile.BadZipFile(f"entry {entry.filename!r} is compressed, which torch never does")
        if entry.filename in seen or entry.filename.startswith("/") or ".." in PurePosixPath(entry.filename).parts:
            raise zipfile.BadZipFile(f"entry {entry.filename!r} stands twice or leads out of the archive")
        seen.add(entry.filename)
    return True


def _load_trusted(path: Path, mmap: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=mmap)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{path} needs code that is not installed here: {error}. Install it, or save the tensors alone where it is."
        ) from error
    except (pickle.UnpicklingError, OSError, *MALFORMED) as error:
        raise unreadable_tensors(path, error) from error


def unpickling_reason(error: pickle.UnpicklingError) -> str:
    """Returns the class or function that torch's restricted unpickler met, or else what it could not read."""
    found = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"WeightsUnpickler error: (.+)", str(error))
    return found.group(1) if found else str(error).splitlines()[0]
