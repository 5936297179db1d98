"""Asks scripts for their help, each in a fork of this process, and prints what they answer as a JSON line.

    python -m tests.helpers.help_answers SCRIPT [SCRIPT ...]

This process has imported what all scripts may: a fork takes a tenth of the time of a start.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import megatron_tokenformer  # noqa: F401 - refuses a foreign checkout once for all

import matplotlib.figure  # noqa: F401

import megatron.config.load_config  # noqa: F401
import tools.command_line  # noqa: F401

SLOW = ("torch", "transformers", "lm_eval", "deepspeed", "datasets")


def answer(script: str) -> dict[str, Any]:
    """Returns exit code, text, slow imports, flags, and arguments without a word on what they are for."""
    parsers: list[argparse.ArgumentParser] = []
    build = argparse.ArgumentParser.__init__

    def keep(parser: argparse.ArgumentParser, *args: Any, **options: Any) -> None:
        build(parser, *args, **options)
        parsers.append(parser)

    argparse.ArgumentParser.__init__ = keep  # type: ignore[method-assign]
    sys.argv = [script, "--help"]
    printed, code = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
    actions = [action for action in parsers[-1]._actions if action.help != argparse.SUPPRESS] if parsers else []
    return {
        "code": code,
        "text": printed.getvalue(),
        "slow": [name for name in SLOW if name in sys.modules],
        "flags": [flag for action in actions for flag in action.option_strings],
        "silent": [action.dest for action in actions if not action.help],
    }


def main(scripts: list[str]) -> None:
    """Forks for each script in turn."""
    for script in scripts:
        if os.fork() == 0:
            # As when the script is run by its name.
            sys.path[0] = str(Path(script).resolve().parent)  # noqa: TID251
            line = json.dumps({script: answer(script)})
            os.write(1, line.encode() + b"\n")
            os._exit(0)
        os.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
