"""The command line that deepy.py, train.py, generate.py, eval.py, tools/validate.py and token_curve.py share."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.effective_config import effective_text, summary
from megatron.config.load_config import LoadedConfig, files_of, load_config, print_warnings
from megatron.config.local_path import local_path, url_remedy
from megatron.config.merge_files import split_words

SUFFIXES = (".yml", ".yaml", ".json")

SCRIPTS = {
    "train.py": "Trains a model as its configuration says, or goes on with a run.",
    "validate.py": "Measures a checkpoint's loss on a fixed part of the validation data.",
    "token_curve.py": "Draws loss and tasks of a checkpoint over its sizes.",
    "generate.py": "Samples text from a trained model.",
    "eval.py": "Scores checkpoints on tasks of lm-eval.",
}
"""Scripts that deepy.py starts on ranks, and what each does."""

TRAINING_SCRIPT = "train.py"
"""The script that goes on with a run; each other one reads its checkpoints."""

EVALUATION_FLAGS = {
    "--eval_results_prefix": "eval_results_prefix",
    "--eval_num_fewshot": "eval_num_fewshot",
    "--eval_task_limit": "eval_task_limit",
    "--limit": "eval_task_limit",
    "--eval_batch_size": "eval_batch_size",
    "--bootstrap_iters": "eval_bootstrap_iters",
    "--include_path": "eval_include_path",
    "--output": "eval_output",
    "--hf_model": "eval_hf_model",
}
"""Flags of NeoX and of lm-eval, and the key that each sets."""

PLANNING_FLAGS = {
    "plan": "show memory, time and disk of the run and the layouts that fit, and stop; starts no rank",
    "calibrate": "measure for a minute, on the run's ranks, the rates that plans for this machine are made of",
    "preflight": "try on the run's ranks all that it will need: files, disk, network, one step at full size, a save",
}
"""Flags of train.py that do something in place of training, and what."""


@dataclass(frozen=True)
class CommandLine:
    """A command line of these programs, taken apart."""

    files: tuple[Path, ...]
    overrides: tuple[str, ...] = ()
    check: bool = False
    """Validate and stop."""
    world_size: int | None = None
    """Ranks to validate the batch for."""
    print_effective_config: bool = False
    """Show the effective configuration and stop."""
    plan: bool = False
    """Show what the run needs and which layouts fit, and stop."""
    device: str | None = None
    """Device to plan for; None means this machine's."""
    calibrate: bool = False
    """Measure the rates that plans are made of, on the run's ranks, in place of the run."""
    preflight: bool = False
    """Try everything that the run will do, on its ranks, in place of the run."""

    @property
    def answered(self) -> bool:
        """Tells whether validating the configuration was all that was asked for."""
        return self.check or self.print_effective_config or self.plan


def command_parser(script: str | None = None) -> argparse.ArgumentParser:
    """Builds the parser of a script of SCRIPTS, whose help lists the flags that the script reads; None lists all.

    Every script takes every flag: each sets a key, and a YAML of all three may hold it too.
    """
    prog = f"python deepy.py {script or 'SCRIPT.py'}"
    parser = argparse.ArgumentParser(
        prog,
        usage=f"{prog} [-d DIR] a.yml b.yml key=value ... [flags]\n       {prog} RUN_FOLDER key=value ... [flags]",
        description=SCRIPTS.get(script or ""),
        allow_abbrev=False,
        epilog="configs/README.md explains every key. Paths are as seen from the current folder.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-d",
        "--conf_dir",
        "--conf-dir",
        metavar="DIR",
        type=local_path,
        default=Path(),
        help="folder of the YAML files",
    )
    parser.add_argument("--check", action="store_true", help="validate the configuration and stop")
    parser.add_argument("--world-size", type=_ranks, metavar="N", help="ranks to validate the batch, or plan, for")
    parser.add_argument("--print-effective-config", action="store_true", help="show every value and its origin")
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="print the commands that deepy.py would start, and stop"
    )
    _add_planning_flags(parser, shown=script in {None, TRAINING_SCRIPT})
    parser.add_argument("words", nargs="+", metavar="a.yml b.yml key=value", help="YAML files or a run, overrides")
    several = "; several, or all, for eval.py" if script in {None, "eval.py"} else ""
    parser.add_argument("--iteration", nargs="+", metavar="N", help=f"step of the checkpoint to load{several}")
    _add_evaluation_flags(parser, shown=script in {None, "eval.py", "token_curve.py"})
    return parser


def parse_command_line(argv: Sequence[str], script: str | None = None) -> CommandLine:
    """Parses `[-d DIR] a.yml b.yml key=value ... [--check] [--world-size N] [--print-effective-config]` and the
    flags of evaluation, each of which is an override by another name.

    As in NeoX, DIR goes before every file and `.yml` is added to names without a suffix. The folder of a run may stand
    in place of the files: the configuration that it keeps is then the default. Exits with code 2 and a usage line when
    the arguments make no sense; raises ConfigError for a folder that keeps no configuration.
    """
    parser = command_parser(script)
    options = parser.parse_intermixed_args(argv)
    names, overrides = split_words(options.words)
    for name in names:
        if url_remedy(name):
            parser.error(f"{name}: expected a YAML file on this machine{url_remedy(name)}")
    if options.dry_run:
        parser.error("--dry-run shows what deepy.py would start; it follows `python deepy.py SCRIPT.py`")
    if not names:
        parser.error("a YAML file or a run's folder is needed; it stands before --eval_tasks")
    overrides += _evaluation_overrides(options)
    paths = [_path_of(options.conf_dir / name) for name in names]
    files, implied = files_of(paths, overrides, trains=script == TRAINING_SCRIPT)
    asked = [flag for flag in PLANNING_FLAGS if getattr(options, flag)]
    if asked and script not in {None, TRAINING_SCRIPT}:
        parser.error(f"--{asked[0]} is about training; it follows `python deepy.py {TRAINING_SCRIPT}`")
    if len(asked) > 1:
        parser.error(f"--{asked[0]} and --{asked[1]} are done one after the other")
    if options.device is not None and not (options.plan or options.check):
        parser.error("--device says what to plan for; it goes with --plan or --check")
    return CommandLine(
        tuple(files),
        (*implied, *overrides),
        options.check,
        options.world_size,
        options.print_effective_config,
        device=options.device,
        **{flag: getattr(options, flag) for flag in PLANNING_FLAGS},
    )


def _add_planning_flags(parser: argparse.ArgumentParser, *, shown: bool) -> None:
    group = parser.add_argument_group("before a run (train.py)") if shown else parser
    for name, meaning in PLANNING_FLAGS.items():
        group.add_argument(f"--{name}", action="store_true", help=meaning if shown else argparse.SUPPRESS)
    device = "device to plan or check for, such as a100-80gb, h200 or cpu; unset, what this machine has"
    group.add_argument("--device", metavar="NAME", help=device if shown else argparse.SUPPRESS)


def _add_evaluation_flags(parser: argparse.ArgumentParser, *, shown: bool) -> None:
    group = parser.add_argument_group("evaluation (eval.py, token_curve.py)") if shown else parser

    def add(flag: str, meaning: str, **kind: Any) -> None:
        names = dict.fromkeys([flag, flag.replace("_", "-")])
        group.add_argument(*names, help=meaning if shown else argparse.SUPPRESS, **kind)

    add("--eval_tasks", "tasks of lm-eval", nargs="*", metavar="TASK")
    add("--log_samples", "eval_log_samples=true: lm-eval's log of samples", action="store_true")
    for flag, key in EVALUATION_FLAGS.items():
        add(flag, f"{key}=VALUE", dest=key, metavar="VALUE")


def _evaluation_overrides(options: argparse.Namespace) -> list[str]:
    """Turns the flags into overrides. A key=value after a list of values is an override of its own."""
    overrides = []
    for key in dict.fromkeys(EVALUATION_FLAGS.values()):
        value = getattr(options, key)
        if value is not None:
            overrides.append(f"{key}={value}")
    if options.log_samples:
        overrides.append("eval_log_samples=true")
    for name, values in (("eval_tasks", options.eval_tasks), ("iteration", options.iteration)):
        own, others = split_words(values or ())
        overrides += others
        if name == "eval_tasks" and values is not None:
            overrides.append(f"eval_tasks={json.dumps(own)}")
        elif own == ["all"]:
            overrides.append("eval_iterations=all")
        elif len(own) > 1 or (own and options.eval_tasks is not None):
            overrides.append(f"eval_iterations=[{', '.join(own)}]")
        elif own:
            overrides.append(f"iteration={own[0]}")
    return overrides


def load_command_line(
    argv: Sequence[str],
    script: str | None = None,
    check: Callable[[LoadedConfig, CommandLine], list[str]] = lambda loaded, command: [],
) -> tuple[CommandLine, LoadedConfig]:
    """Loads the configuration that a command line names, and prints what `--check` and `--print-effective-config` ask.

    `script` is the one of SCRIPTS that it is for. `check` is of what this package cannot know; it returns lines for
    `--check` to print. Raises ConfigError for what is wrong with the configuration, also with its batch on
    `--world-size` ranks.
    """
    command = parse_command_line(argv, script)
    loaded = load_config(command.files, command.overrides)
    if command.world_size is not None:
        loaded.batch(command.world_size)
    found = check(loaded, command)
    if command.answered and isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal may not have all letters of a path.
        sys.stdout.reconfigure(errors="backslashreplace")
    if command.print_effective_config:
        print(effective_text(loaded, command.world_size))
    elif command.check:
        print("\n".join(["the configuration is valid", *summary(loaded, command.world_size), *found]))
    if command.answered:
        print_warnings(loaded)
    return command, loaded


def _ranks(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("expected at least 1 rank")
    return count


def _path_of(name: Path) -> Path:
    """Returns the YAML file that a name means, as in NeoX, or else the folder of that name."""
    if name.name.endswith(SUFFIXES):
        return name
    file = name.with_name(f"{name.name}.yml")
    return name if name.is_dir() and not file.exists() else file
