"""Start of the commands that measure a checkpoint on the first eval_iters batches of the validation data."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron.errors import ConfigError

if TYPE_CHECKING:
    from megatron.config.sections.run_config import RunConfig


def load_validation(argv: Sequence[str], script: str) -> tuple[RunConfig, int] | None:
    """Returns the configuration of a command and the samples to measure; None when `--check` or its like is answered.

    Raises ConfigError when there is nothing to measure.
    """
    from megatron.config.command_line import load_command_line
    from megatron.config.load_config import print_warnings

    command, loaded = load_command_line(argv, script)
    if command.answered:
        return None
    from megatron.launch.environment import prepare_environment

    prepare_environment()
    print_warnings(loaded)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    run = loaded.run
    batch = run.training.train_batch_size or loaded.batch(int(os.environ["WORLD_SIZE"])).global_batch_size
    samples = run.training.eval_iters * batch
    if not samples:
        raise ConfigError("eval_iters: 0: nothing is to be measured. Set the batches of a validation, such as to 20.")
    return run, samples
