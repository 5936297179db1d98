"""Samples text from a trained model: `python deepy.py generate.py config.yml load=runs/mine temperature=0.8`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.config.cli import load_command_line
from megatron.errors import exit_on_user_error


def main(argv: Sequence[str]) -> int:
    """Load the configuration and a checkpoint, and write one JSON line per sample."""
    command, loaded = load_command_line(argv)
    if command.answered:
        return 0
    from megatron.training.distributed import prepare_environment

    prepare_environment()
    from megatron.inference.text import sample_text

    output = loaded.run.generation.sample_output_file
    with contextlib.ExitStack() as stack:
        if output is None:
            file = sys.stdout
        else:
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(Path(output).open("w", encoding="utf-8"))
        for record in sample_text(loaded.run):
            print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
    return 0


if __name__ == "__main__":
    exit_on_user_error(lambda: main(sys.argv[1:]))
