"""Starts a script of this project on every rank: `python deepy.py train.py [-d DIR] a.yml b.yml key=value ...`

The configuration is validated first, before torch is imported and before any rank starts. One rank replaces this
process; several are supervised: signals are passed on to all of them, and when one fails the others are ended too. A
run that a signal or a limit has ended, after it was saved, ends with exit code 75 (megatron/errors.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.errors import ConfigError, end_at_once_when_stopped, exit_on_user_error

TRAINING_SCRIPT = "train.py"
"""Every other script runs a trained model, which has no batch triangle and no pipeline."""
HELP = {"-h", "--help"}


def main(argv: Sequence[str]) -> int:
    """Validates the configuration, then runs the script on the ranks of this machine; returns its exit code."""
    if argv and argv[0] in HELP:
        print(help_text())
        return 0
    if not argv or not argv[0].endswith(".py"):
        raise ConfigError(
            "usage: python deepy.py SCRIPT.py [-d DIR] CONFIG.yml [CONFIG.yml ...] [key=value ...]; "
            "`python deepy.py --help` lists scripts and flags"
        )
    script, arguments = find_script(argv[0]), argv[1:]
    if script.name == TRAINING_SCRIPT:
        end_at_once_when_stopped()
    from megatron.config.command_line import load_command_line
    from megatron.growth.check_config import require_growable
    from megatron.launch.local import run_ranks, visible_devices
    from megatron.training.check_config import require_trainable

    check = require_trainable if script.name == TRAINING_SCRIPT else require_growable
    command, loaded = load_command_line(arguments, script.name, check)
    if command.answered:
        return 0
    ranks = loaded.run.launch.num_gpus or visible_devices()
    if script.name == TRAINING_SCRIPT:
        loaded.batch(ranks)
    else:
        loaded.replicas(ranks)
    return run_ranks([sys.executable, str(script), *arguments], ranks, loaded.run.launch.master_port)


def help_text() -> str:
    """Returns the scripts, and the flags of each, as its own parser has them."""
    from megatron.config.command_line import SCRIPTS, command_parser

    parser = command_parser()
    parser.description = "\n".join(
        ["Starts a script of this project on every rank:", *(f"  {name:<13}{does}" for name, does in SCRIPTS.items())]
    )
    return parser.format_help()


def find_script(word: str) -> Path:
    """Returns a script by its path, or by its name alone: then from any folder, and always the one beside this file."""
    own = Path(__file__).resolve().with_name(Path(word).name)
    script = own if Path(word) == Path(own.name) and own.is_file() else Path(word)
    if not script.is_file():
        raise ConfigError(f"{script}: no such script. deepy.py runs train.py, validate.py, generate.py or eval.py.")
    return script


if __name__ == "__main__":
    exit_on_user_error(lambda: main(sys.argv[1:]))
