"""A tensor- and pipeline-parallel trainer for language models whose parameters are tokens."""

import os
import warnings
from importlib.metadata import PackageNotFoundError, version

try:
    _core = version("megatron-core")
except PackageNotFoundError:
    pass
else:
    # Rank 0 speaks for all of them.
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(
            f"megatron-core {_core} is installed here too, and its package has the same name: `megatron` is now "
            f"{__path__[0]}, which has no `megatron.core`. Uninstall the other one (pip uninstall megatron-core), or "
            "give this project an environment of its own, as `make` does.",
            stacklevel=2,
        )
