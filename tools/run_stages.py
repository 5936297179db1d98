"""Trains a model in stages: train, grow, train on, as a plan says; started again, it goes on where it was.

    python tools/run_stages.py configs/growth/wsd.yml --check
    python tools/run_stages.py configs/growth/wsd.yml train_data_paths=[data/owt_text_document] num_gpus=8

Every stage is a difference to the one before, with a budget (megatron/growth/staged_plan.py has the format). The plan
is shown first, with parameters, FLOPs and tokens, and refused where a stage cannot follow the one before. Each stage is
one `deepy.py train.py`, printed before it runs, with a YAML file beside its folder: it loads the last checkpoint of the
stage before, and grows it as `grow` says. A stage whose newest checkpoint is of its last step is done. Signals are
passed on; the exit code is then that of the training: 75 asks to be started again.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megatron_tokenformer import run_tool

import yaml

from megatron.config.effective_config import changed_values
from megatron.config.local_path import local_path
from megatron.config.merge_files import split_words
from megatron.config.model_size import count_parameters, training_flops
from megatron.data.tokenizer import build_tokenizer, padded_vocab_size
from megatron.errors import STOPPED_ON_REQUEST, CheckpointError
from megatron.io.durable import replace_durably
from megatron.launch.local import visible_devices
from megatron.launch.supervise import FORWARDED_SIGNALS
from megatron.monitor.format_quantities import format_count
from tools.command_line import positive, stay_on_cpu, tool_parser

if TYPE_CHECKING:
    from megatron.checkpointing.store.checkpoint import Checkpoint
    from megatron.growth.staged_plan import Stage

TRAINING_SCRIPT = "train.py"
ROOT = Path(__file__).resolve().parents[1]
OUTPUT_KEYS = frozenset({"log_interval", "num_gpus", "master_port", "num_workers", "verify_checkpoint"})
"""Keys that a stage which is done may be given another value of."""


def main(argv: Sequence[str]) -> int:
    """Shows the plan, then trains what is left of it; returns the exit code."""
    args = parse_args(argv)
    stay_on_cpu()
    from megatron.growth.staged_plan import load_plan

    ranks = None if args.check else visible_devices()
    plan = load_plan(args.plan, args.overrides, folder=args.folder, ranks=args.world_size or ranks)
    places = [StagePlace.of(stage) for stage in plan.stages]
    print("\n".join(table(places)), flush=True)
    for place in places:
        for line in place.changes():
            print(f"warning: {line}", file=sys.stderr)
    return 0 if args.check else train_stages(places, ProjectCommands())


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = tool_parser(__doc__)
    parser.add_argument("words", nargs="+", metavar="plan.yml key=value", help="a plan, and keys for every stage")
    parser.add_argument("--folder", type=local_path, help="folder of the stages' runs, in place of the plan's")
    parser.add_argument("--check", "--dry_run", "--dry-run", action="store_true", help="show the plan and stop")
    parser.add_argument("--world-size", type=positive, metavar="N", help="ranks to validate the batch for")
    args = parser.parse_intermixed_args(argv)
    plans, args.overrides = split_words(args.words)
    if len(plans) != 1:
        parser.error(f"expected one plan, not {len(plans)}: {' '.join(plans)}")
    args.plan = Path(plans[0])
    return args


@dataclass(frozen=True)
class StagePlace:
    """A stage, and how far it is."""

    stage: Stage
    newest: Checkpoint | None
    """Its newest readable checkpoint; None before the first."""

    @classmethod
    def of(cls, stage: Stage) -> StagePlace:
        """Looks at a stage's folders. Raises CheckpointError for one that has gone beyond its budget."""
        from megatron.checkpointing.store.find_checkpoint import readable_checkpoints

        newest = next(iter(readable_checkpoints(stage.folder)), None)
        if newest is not None and newest.state.iteration > stage.last_step:
            raise CheckpointError(
                f"{newest.path}: stage {stage.name} ({stage.origin}) ends at step {stage.last_step:,}, and has trained "
                "beyond it. Give it a larger budget, or the plan another folder."
            )
        return cls(stage, newest)

    @property
    def is_done(self) -> bool:
        """Tells whether its newest checkpoint is of its last step."""
        return self.newest is not None and self.newest.state.iteration == self.stage.last_step

    @property
    def progress(self) -> str:
        """Says in a word how far it is."""
        if self.newest is None:
            return "to do"
        steps = self.newest.state.iteration - self.stage.first_step
        return "done" if self.is_done else f"{steps / (self.stage.last_step - self.stage.first_step):.0%} done"

    def changes(self) -> list[str]:
        """Lists keys that a finished stage was trained with otherwise than the plan says now, one sentence each."""
        from megatron.growth.staged_plan import SET_BY_PLAN

        if self.newest is None or not self.is_done:
            return []  # A run that goes on compares its configuration with the checkpoint's itself.
        return [
            f"{self.stage.folder} was trained with {value.key}: {value.first}, and the plan says {value.second}. "
            "Remove the folder to train the stage again."
            for value in changed_values(self.newest.config, self.stage.loaded.run)
            if value.key not in SET_BY_PLAN | OUTPUT_KEYS
        ]


class ProjectCommands:
    """Runs commands of the project, and passes signals on to the one that runs."""

    def __init__(self) -> None:
        self.stopped = False
        """Whether a signal has asked to stop."""
        self._child: subprocess.Popen[bytes] | None = None
        for number in FORWARDED_SIGNALS:
            signal.signal(number, self._forward)

    def __call__(self, script: str, *words: str) -> int:
        """Runs `python SCRIPT WORDS` where this tool was started, and prints it; returns its exit code.

        That is STOPPED_ON_REQUEST for a command that a request to stop has ended, or kept from starting.
        """
        if self.stopped:
            return STOPPED_ON_REQUEST
        print(f"$ python {script} {' '.join(words)}", flush=True)
        paths = [str(ROOT / word) if word == TRAINING_SCRIPT else word for word in words]
        self._child = subprocess.Popen([sys.executable, str(ROOT / script), *paths])
        code = self._child.wait()
        if self.stopped and -code in FORWARDED_SIGNALS:
            return STOPPED_ON_REQUEST
        return code if code >= 0 else 128 - code

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)


def train_stages(places: Sequence[StagePlace], command: ProjectCommands) -> int:
    """Trains the stages that are not done; returns the exit code of the command that ended it, or 0."""
    for place in places:
        stage = place.stage
        if place.is_done:
            print(f"\n{stage.name}: done, {stage.last_step:,} steps", flush=True)
            continue
        print(f"\n{stage.name}: steps {stage.first_step:,} to {stage.last_step:,}", flush=True)
        stage.config_file.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(stage.config_file, yaml.safe_dump(stage.keys, sort_keys=False))
        code = command("deepy.py", TRAINING_SCRIPT, str(stage.config_file))
        # A stage whose schedule goes on in the next one ends by exit_interval, as a run that is to be started again.
        if code == STOPPED_ON_REQUEST and not command.stopped and StagePlace.of(stage).is_done:
            continue
        if code != 0:
            return code
    return 0


def table(places: Sequence[StagePlace]) -> list[str]:
    """Lays the stages out in columns: sizes, parameters, budget and cost, alone and summed up."""
    stages = [place.stage for place in places]
    rows = [vocabulary_rows(stage) for stage in stages]
    flops = [
        stage.tokens * training_flops(stage.loaded.run.model, count, stage.loaded.run.model.seq_length)
        for stage, count in zip(stages, rows, strict=True)
    ]
    inner = [count_parameters(stage.loaded.run.model, 0) for stage in stages]
    lines = [
        ["stage", "starts from", "layers", "q·k·v / proj / ffn", "parameters", "growth", "steps", "tokens",
         "tokens/param", "FLOPs", "all tokens", "all FLOPs", ""]
    ]  # fmt: skip
    sums = zip(accumulate(stage.tokens for stage in stages), accumulate(flops), strict=True)
    for index, (place, (all_tokens, all_flops)) in enumerate(zip(places, sums, strict=True)):
        stage, sizes = place.stage, place.stage.sizes
        tokens = (sizes.qkv, sizes.proj, sizes.ffn)
        parameters = count_parameters(stage.loaded.run.model, rows[index])
        lines.append([
            stage.name,
            "initial weights" if index == 0 else start_words(stages[index - 1], stage),
            str(sizes.num_layers),
            "-" if None in tokens else " / ".join(f"{count:,}" for count in tokens),
            f"{parameters:,}",
            "-" if index == 0 else f"{inner[index] / inner[index - 1]:.2f}x",
            f"{stage.last_step - stage.first_step:,}",
            format_count(stage.tokens),
            f"{all_tokens / parameters:.1f}",
            f"{flops[index]:.2e}",
            format_count(all_tokens),
            f"{all_flops:.2e}",
            place.progress,
        ])  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ] + ["growth: parameters beside the embedding, over those of the stage before; tokens/param: all tokens so far"]


def start_words(before: Stage, stage: Stage) -> str:
    """Says what a stage makes of the one before it."""
    grow = stage.loaded.run.grow
    grown = f" by {grow.operator}" if grow is not None and stage.sizes != before.sizes else ""
    return f"{before.name}{grown}{', restarts' if stage.restarts else ''}"


def vocabulary_rows(stage: Stage) -> int:
    """Returns the rows of a stage's embedding, of the tokenizer where `padded_vocab_size` does not say them."""
    run = stage.loaded.run
    if run.model.padded_vocab_size is not None:
        return run.model.padded_vocab_size
    return padded_vocab_size(run.model, build_tokenizer(run.data.tokenizer).vocab_size)


if __name__ == "__main__":
    run_tool(main)
