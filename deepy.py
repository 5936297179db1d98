"""Starts a script of this project on every rank: `python deepy.py train.py [-d DIR] a.yml b.yml key=value ...`

The configuration is validated first, before torch is imported and before any rank starts. Ranks run on this machine, on
those of a hostfile, or as tasks of srun or mpirun (`launcher`). One rank alone replaces this process; several are
supervised: signals are passed on to all of them, and when one fails the others are ended too, and its reason is
printed last. `--dry-run` prints what would be started. A run that a signal or a limit has ended, after it was saved,
ends with exit code 75 (megatron/errors.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.errors import ConfigError, end_at_once_when_stopped, exit_on_user_error

if TYPE_CHECKING:
    from megatron.config.command_line import CommandLine
    from megatron.config.load_config import LoadedConfig

    Check = Callable[[LoadedConfig, CommandLine], list[str]]

TRAINING_SCRIPT = "train.py"
"""Every other script runs a trained model, which has no batch triangle and no pipeline."""
HELP = {"-h", "--help"}
DRY_RUN = {"--dry-run", "--dry_run"}


def main(argv: Sequence[str]) -> int:
    """Validates the configuration, then has the script run on all ranks; returns its exit code."""
    if argv and argv[0] in HELP:
        print(help_text())
        return 0
    if argv and argv[0].startswith("--"):
        return serve(argv)
    if not argv or not argv[0].endswith(".py"):
        raise ConfigError(
            "usage: python deepy.py SCRIPT.py [-d DIR] CONFIG.yml [CONFIG.yml ...] [key=value ...]; "
            "`python deepy.py --help` lists scripts and flags"
        )
    script = find_script(argv[0])
    arguments = [word for word in argv[1:] if word not in DRY_RUN]
    if script.name == TRAINING_SCRIPT:
        end_at_once_when_stopped()
    from megatron.config.command_line import load_command_line
    from megatron.growth.check_config import require_growable
    from megatron.training.check_config import require_trainable

    trains = script.name == TRAINING_SCRIPT
    check: Check = require_trainable if trains else lambda loaded, command: require_growable(loaded)
    command, loaded = load_command_line(arguments, script.name, check)
    if command.plan:
        from megatron.training.plan_run import plan_report

        print(plan_report(loaded, command))
    if command.answered:
        return 0
    return launch(script, arguments, loaded, dry_run=len(arguments) < len(argv) - 1)


def launch(script: Path, arguments: Sequence[str], loaded: LoadedConfig, *, dry_run: bool) -> int:
    """Starts the ranks wherever they are to run, or shows how; returns the exit code of the run."""
    from megatron.launch.choose_launcher import choose_launcher
    from megatron.launch.elsewhere import require_reachable, run_elsewhere, shown
    from megatron.launch.environment import adopt_launcher_environment, find_place
    from megatron.launch.launcher import Job
    from megatron.launch.local import run_ranks, run_task, show_local

    config = loaded.run.launch
    job = Job(
        str(Path(__file__).resolve()), str(script.resolve()), tuple(arguments), config, (), str(Path.cwd()), os.environ
    )
    found = find_place(os.environ)
    if found is not None and found[0].world_size > 1:
        require_ranks(script, loaded, found[0].world_size)
        environment = dict(os.environ)
        adopt_launcher_environment(environment)
        return run_task(list(job.rank_command), environment, config, is_child=found[1].is_parent(os.environ))
    name, start = choose_launcher(job)
    ranks = len(start) if isinstance(start, tuple) else start.world_size
    require_ranks(script, loaded, ranks)
    if isinstance(start, tuple):
        command = list(job.rank_command)
        if dry_run:
            print(show_local(command, start, config))
            return 0
        return run_ranks(command, start, config)
    if dry_run:
        print("\n".join(shown(start)))
        return 0
    if not config.no_ssh_check:
        require_reachable(start)
    print(f"deepy.py: {ranks} ranks by launcher: {name}", file=sys.stderr, flush=True)
    return run_elsewhere(start, config.termination_grace_seconds)


def require_ranks(script: Path, loaded: LoadedConfig, ranks: int) -> None:
    """Raises ConfigError where the configuration does not fit the number of ranks."""
    if script.name == TRAINING_SCRIPT:
        loaded.batch(ranks)
    else:
        loaded.replicas(ranks)


def serve(argv: Sequence[str]) -> int:
    """Does on a machine of the hostfile what deepy.py has been started there for by another of itself."""
    from megatron.launch.nodes import NODE_FLAG, TELL_FLAG, run_node, tell_node

    serving = {NODE_FLAG: run_node, TELL_FLAG: tell_node}
    if argv[0] not in serving:
        raise ConfigError(f"{argv[0]}: the script comes first: python deepy.py SCRIPT.py ... {argv[0]}")
    return serving[argv[0]](argv[1:])


def help_text() -> str:
    """Returns the scripts, and the flags of each, as its own parser has them."""
    from megatron.config.command_line import SCRIPTS, command_parser

    parser = command_parser()
    parser.description = "\n".join(
        ["Starts a script of this project on every rank:", *(f"  {name:<13}{does}" for name, does in SCRIPTS.items())]
    )
    return parser.format_help()


def find_script(word: str) -> Path:
    """Returns a script by its path, or by its name alone: then from any folder, and always this checkout's own."""
    script = Path(word)
    if script == Path(script.name):
        beside = Path(__file__).resolve().parent
        own = [folder / word for folder in (beside, beside / "tools") if (folder / word).is_file()]
        script = own[0] if own else script
    if not script.is_file():
        raise ConfigError(
            f"{script}: no such script. deepy.py runs train.py, validate.py, token_curve.py, generate.py or eval.py."
        )
    return script


if __name__ == "__main__":
    exit_on_user_error(lambda: main(sys.argv[1:]))
