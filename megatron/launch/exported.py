"""Variables that ranks on other machines are given: those that libraries read, and no secret."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.config.redaction import redact

_PREFIXES = (
    *("NCCL_", "GLOO_", "UCX_", "FI_", "IBV_", "RDMAV_", "OMP_", "MKL_", "KMP_"),
    *("TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "CUDA_", "CUBLAS_", "DS_", "DEEPSPEED_", "PYTHON"),
)
_NAMES = (
    *("PATH", "LD_LIBRARY_PATH", "CPATH", "CC", "CXX", "TMPDIR", "LANG", "LC_ALL", "VIRTUAL_ENV"),
    *(
        "HF_HOME",
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "WANDB_MODE",
        "TOKENIZERS_PARALLELISM",
    ),
)
_OF_THIS_MACHINE = {"CUDA_VISIBLE_DEVICES"}


def exported(environment: Mapping[str, str]) -> dict[str, str]:
    """Chooses what of an environment holds on other machines too. What may be a secret is left out."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name.startswith(_PREFIXES) or name in _NAMES)
        and name not in _OF_THIS_MACHINE
        and redact(value, name) == value
    }
