"""The loop of run_stages.py for plans of Inheritune: train a round, compare with the reference, append its next layers.

What was measured and decided is printed, and kept in decisions.json beside the rounds. All of it follows from the
rounds' checkpoints and the reference, so a loop that was killed at any moment goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron.errors import CheckpointError
from megatron.io.durable import replace_durably
from megatron.io.json_files import read_json_object

if TYPE_CHECKING:
    from megatron.checkpointing.store.checkpoint import Checkpoint
    from megatron.growth.inheriting.rounds_plan import RoundsPlan
    from megatron.growth.staged_plan import Stage

IMPORT_SCRIPT = "tools/ckpts/convert_hf_to_neox.py"


@dataclass(frozen=True)
class Measured:
    """A checkpoint's loss on the fixed validation samples, as validate.py writes it."""

    checkpoint: str
    run_id: str
    iteration: int
    loss: float
    samples: int
    data: str
    """Fingerprint of the samples: losses with the same one can be compared."""

    def is_of(self, checkpoint: Checkpoint) -> bool:
        """Tells whether it was measured on this checkpoint."""
        return (self.run_id, self.iteration) == (checkpoint.manifest.run_id, checkpoint.state.iteration)


@dataclass
class Decisions:
    """Measurements and decisions of a loop so far."""

    reference: Measured
    margin: float
    rounds: list[dict[str, Any]] = field(default_factory=list)
    outcome: str | None = None
    """None while the loop goes on."""

    def write(self, file: Path) -> None:
        """Replaces the file."""
        replace_durably(file, json.dumps({"format": 1, **asdict(self)}, indent=1) + "\n")


class CommandEndedError(Exception):
    """A command has not ended well: `code` is what the loop ends with."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class InheritingLoop:
    """One loop. `command` runs a script of the project; `train` trains a round, or what is left of it.

    Both return an exit code.
    """

    def __init__(self, plan: RoundsPlan, command: Callable[..., int], train: Callable[[Stage], int]) -> None:
        self.plan = plan
        self._command = command
        self._train = train

    def run(self) -> int:
        """Trains rounds until one meets the reference, or the plan has no more; returns the exit code."""
        self.plan.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._import_reference()
            reference = self._measure_reference(self.plan.rounds[0])
            print(f"\nreference: validation loss {reference.loss:.4f} on {reference.samples:,} samples", flush=True)
            self._train_rounds(Decisions(reference, self.plan.margin))
        except CommandEndedError as ended:
            return ended.code
        return 0

    def _train_rounds(self, decisions: Decisions) -> None:
        rounds = self.plan.rounds
        for stage, following in zip_longest(rounds, rounds[1:]):
            _require_success(self._train(stage))
            found = self._measure(stage.name, stage.folder, stage)
            if found.data != decisions.reference.data:
                # Something that decides the samples was changed since one of them was measured.
                found = self._measure(stage.name, stage.folder, stage, anew=True)
                decisions.reference = self._measure_reference(stage, anew=True)
            reference = decisions.reference
            decision, decisions.outcome = self._decide(
                stage, following, is_met=found.loss <= reference.loss + decisions.margin
            )
            decisions.rounds.append(
                {
                    "round": stage.name,
                    "layers": stage.sizes.num_layers,
                    **asdict(found),
                    "above_reference": found.loss - reference.loss,
                    "decision": decision,
                }
            )
            decisions.write(self.plan.decisions_file)
            print(
                f"{stage.name}: validation loss {found.loss:.4f}, the reference's {reference.loss:.4f}: {decision}",
                flush=True,
            )
            if decisions.outcome is not None:
                break
        print(f"{decisions.outcome} (see {self.plan.decisions_file})", flush=True)

    def _decide(self, stage: Stage, following: Stage | None, *, is_met: bool) -> tuple[str, str | None]:
        """Returns what comes after a round, and how the loop ends with it; None where it goes on."""
        layers = stage.sizes.num_layers
        depth = "1 layer" if layers == 1 else f"{layers} layers"
        if is_met:
            return "met", f"The reference is met with {depth}."
        if following is None:
            return "the budget ends", f"The budget of the plan ends with {depth}, above the reference."
        added = range(layers, following.sizes.num_layers)
        return f"append the reference's layers {', '.join(map(str, added))}", None

    def _import_reference(self) -> None:
        """Makes a checkpoint of a Hugging Face folder, unless that was done."""
        plan = self.plan
        model = plan.reference_model
        if not plan.imports_reference or plan.reference_folder.exists() or model is None:
            return
        keys = {
            key: value
            for key, value in plan.rounds[0].keys.items()
            if key not in {"load", "finetune", "auto_resume", "exit_interval"} and not key.startswith("inherit.")
        }
        config = plan.folder / "reference.yml"
        settings = {"num_layers": model.num_layers, "save": str(plan.reference_folder)}
        replace_durably(config, yaml.safe_dump(keys | settings, sort_keys=False))
        words = ["--input_dir", str(plan.reference), "--config_file", str(config)]
        _require_success(self._command(IMPORT_SCRIPT, *words, "--output_dir", str(plan.reference_folder)))

    def _measure_reference(self, stage: Stage, *, anew: bool = False) -> Measured:
        return self._measure("reference", self.plan.reference_folder, stage, anew=anew)

    def _measure(self, name: str, folder: Path, stage: Stage, *, anew: bool = False) -> Measured:
        """Returns the loss of the newest checkpoint of a folder, on the validation samples of a round.

        A loss that was measured before is read, unless `anew` asks for another.
        """
        from megatron.checkpointing.store.find_checkpoint import whole_checkpoint

        checkpoint = whole_checkpoint(folder)
        file = self.plan.folder / "validation" / f"{name}.json"
        known = None if anew else read_measured(file)
        if known is not None and known.is_of(checkpoint):
            return known
        stage.config_file.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(stage.config_file, yaml.safe_dump(stage.keys, sort_keys=False))
        words = [f"load={checkpoint.path}", f"eval_output={file}"]
        _require_success(self._command("deepy.py", "validate.py", str(stage.config_file), *words))
        found = read_measured(file)
        if found is None or not found.is_of(checkpoint):
            raise CheckpointError(
                f"{file} is not of {checkpoint.path}, which changed while it was measured. Start again."
            )
        return found


def _require_success(code: int) -> None:
    if code:
        raise CommandEndedError(code)


def read_measured(file: Path) -> Measured | None:
    """Reads what validate.py has written; None where there is no such file, or it is damaged."""
    try:
        content: Mapping[str, Any] = read_json_object(file)
        found = Measured(**content)
    except (OSError, ValueError, TypeError):
        return None
    return found if isinstance(found.loss, float) and isinstance(found.samples, int) else None
