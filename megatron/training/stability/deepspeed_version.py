"""Keeps models of several stages from training under a DeepSpeed that computes wrong gradients for them.

DeepSpeed 0.18.5 to 0.19.2 divided the gradients of every stage but the last by the accumulation once more, and nothing
showed it (https://github.com/deepspeedai/DeepSpeed/issues/8152).
"""

from __future__ import annotations

import json
import logging
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

from megatron.errors import DataError, EnvironmentSetupError
from megatron.io.durable import atomic_write
from megatron.io.user_cache import user_cache
from megatron.training.stability.pipeline_check import check_pipelines

logger = logging.getLogger(__name__)

TESTED = {"0.19.8"}
"""Versions that this project's own tests hold against plain torch, in all layouts."""
DIVIDING_AGAIN = (Version("0.18.5"), Version("0.19.2"))
"""First and last version with wrong gradients."""
REMEDY = "Install the tested one (`pip install -c requirements/constraints.txt deepspeed`), or train one stage: \
pipe_parallel_size: 1."


def refuse_known_faults(stages: int) -> None:
    """Raises EnvironmentSetupError when the installed DeepSpeed is known to train several stages wrongly."""
    installed = Version(version("deepspeed"))
    # A version with a local part, as 0.19.0+ours, may have been repaired: it is compared like an unknown one.
    if stages > 1 and installed.local is None and DIVIDING_AGAIN[0] <= installed <= DIVIDING_AGAIN[1]:
        raise EnvironmentSetupError(
            f"DeepSpeed {installed} computes wrong gradients with pipe_parallel_size: {stages}: those of every stage "
            f"but the last are divided by the gradient accumulation once more (its issue 8152). {REMEDY}"
        )


def compare_unknown(stages: int) -> None:
    """Holds an untested DeepSpeed against plain torch before it trains several stages, once for each version.

    Raises EnvironmentSetupError when it computes something else, or cannot be compared. A comparison that fails is made
    anew by the next start, as the reason may be gone by then.
    """
    installed = version("deepspeed")
    if stages == 1 or installed in TESTED:
        return
    passed = _passed_file(installed)
    if passed is not None and passed.is_file():
        return
    logger.info("DeepSpeed %s is not a tested version: comparing two stages with plain torch", installed)
    try:
        differences = check_pipelines()
    except EnvironmentSetupError as error:
        raise EnvironmentSetupError(f"DeepSpeed {installed} is not a tested version, and {error}. {REMEDY}") from error
    logger.info("DeepSpeed %s trains two stages as plain torch does", installed)
    _keep(passed, {"deepspeed": installed, "differences": differences})


def _passed_file(installed: str) -> Path | None:
    """Returns the file that is there once a version has passed; None where there is no place for it."""
    cache = user_cache()
    return None if cache is None else cache / f"deepspeed-{installed}-torch-{version('torch')}-passed.json"


def _keep(passed: Path | None, result: dict[str, object]) -> None:
    reason = "there is no home folder"
    if passed is not None:
        try:
            with atomic_write(passed) as temporary:
                temporary.write_text(json.dumps(result, indent=2) + "\n")
        except (OSError, DataError) as error:
            reason = str(error)
        else:
            return
    logger.warning("that this DeepSpeed has passed cannot be kept, and the next start compares again: %s", reason)
