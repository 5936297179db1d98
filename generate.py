"""Samples text from a trained model: `python deepy.py generate.py config.yml load=runs/mine temperature=0.8`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron.errors import exit_on_user_error


def main(argv: Sequence[str]) -> int:
    """Loads the configuration and a checkpoint, and continues prompts. Returns the exit code."""
    from megatron.config.command_line import load_command_line
    from megatron.config.load_config import print_warnings

    command, loaded = load_command_line(argv, "generate.py")
    if command.answered:
        return 0
    from megatron.launch.environment import prepare_environment
    from megatron.mpu.process_group import inference_context

    prepare_environment()
    print_warnings(loaded)
    from megatron.inference.generation.generate_text import generate_text

    loaded.replicas(int(os.environ["WORLD_SIZE"]))
    try:
        with inference_context(loaded.run.parallel.model_parallel_size) as context:
            generate_text(loaded.run, context)
    except BrokenPipeError:
        # The reader of the records has seen enough; Python would complain again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    exit_on_user_error(lambda: main(sys.argv[1:]))
