"""Plans of Inheritune: inherit some layers, train, append the next ones, train on, until the reference is met.

A plan is a YAML file (Sanyal et al. 2024, arXiv:2404.08634, algorithm 1):

    config_files: [medium.yml]        # of every round; paths count from the plan's folder
    folder: runs/inheritune           # a run's folder for each round, by its number of layers, and decisions.json
    inheritune:
      reference: runs/gpt2-medium     # a run's folder, a global_stepN folder, or a Hugging Face folder
      layers: 12                      # that the first round inherits: the reference's first ones
      layers_per_round: 2             # that each later round appends: the reference's next ones
      steps: 100000                   # or tokens; of each round
      max_layers: 16                  # the reference's, unless given
      max_tokens: 120e9               # of all rounds; no bound unless given
      margin: 0.0                     # by which a loss may be above the reference's and meet it [nats per token]
      inherit: {sublayers: [attention, feed_forward, norms]}
      grow: {moments: keep}           # rules of the rounds that append, as in a configuration
      keys: {min_lr: 1.0e-5}          # of every round

Rounds count their steps in one and read on in their data. Each has a learning-rate schedule of its own, of
lr_decay_iters steps, which are those of a round unless the keys say otherwise; `grow: {schedule: continue}` has one for
all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron.checkpointing.states.tensor_folder import is_hf_folder
from megatron.checkpointing.store.checkpoint import checkpoint_paths
from megatron.checkpointing.store.find_checkpoint import whole_checkpoint
from megatron.config.sections.model import ModelConfig
from megatron.config.yaml.problems import Given, Origin, Problem, YamlValue, problem_with, report
from megatron.data.datasets import split_shares
from megatron.errors import ConfigError
from megatron.growth.inheriting.require_inheritance import require_inheritance
from megatron.growth.plan_file import (
    PlanHead,
    StageEntry,
    is_count,
    origin_of,
    problem_at,
    read_keys,
    read_plan,
    unknown_keys,
)
from megatron.growth.staged_plan import Stage, cannot_follow, resolve_group, steps_of

ROUND_KEYS = (
    "reference", "layers", "layers_per_round", "steps", "tokens", "max_layers", "max_tokens", "margin", "inherit",
    "grow", "keys",
)  # fmt: skip
COUNTS = ("layers", "layers_per_round", "max_layers", "max_tokens", "steps", "tokens")
SET_BY_ROUNDS = frozenset({"num_layers", "grow.operator", "grow.reference"})
"""Keys that follow from a round's place."""
READ_HF = Callable[[Path, ModelConfig], ModelConfig]
"""Returns the model of a Hugging Face folder, with what it does not decide from the model that is given."""


@dataclass(frozen=True)
class RoundsPlan:
    """Rounds in the order in which they train, as far as it is needed."""

    file: Path
    folder: Path
    rounds: tuple[Stage, ...]
    reference: Path
    """What the plan names."""
    imports_reference: bool
    """Whether that is a Hugging Face folder, which is made a checkpoint first."""
    reference_model: ModelConfig | None
    """None where there is no checkpoint yet."""
    margin: float

    @property
    def reference_folder(self) -> Path:
        """Returns where the reference's checkpoint is, or will be."""
        return self.folder / "reference" if self.imports_reference else self.reference

    @property
    def decisions_file(self) -> Path:
        """Returns the file of what was measured and decided."""
        return self.folder / "decisions.json"


@dataclass(frozen=True)
class _Rules:
    """The mapping `inheritune` of a plan, read and found to make sense."""

    reference: Path
    layers: int
    layers_per_round: int
    budget: Given
    max_layers: int | None
    max_tokens: int | None
    margin: float
    first: Mapping[str, Given]
    """Keys of the first round beside those of all: its section `inherit`."""
    later: Mapping[str, Given]
    """Keys of the other rounds beside those of all: their section `grow`."""
    keys: Mapping[str, Given]


def load_rounds(
    file: Path, overrides: Sequence[str], read_hf: READ_HF, *, folder: Path | None = None, ranks: int | None = None
) -> RoundsPlan:
    """Reads a plan, and checks every round, that each can follow the one before, and the reference if it is there.

    `overrides` are key=value for every round; `folder` takes the place of the plan's. The batch is checked for `ranks`,
    or for num_gpus, unless both are None. Raises ConfigError with files and lines, CheckpointError for a reference that
    is not whole.
    """
    head = read_plan(file, overrides, "inheritune", "expected a reference, layers, layers_per_round and steps")
    rules = _read_rules(file, head)
    target, files = folder or head.folder, [file, *head.files]
    imports = is_hf_folder(rules.reference)
    loads = target / "reference" if imports else rules.reference
    origin = Origin("file", "inheritune", file, head.content["layers"].line)
    # A placeholder until the steps of a round are known, which its batch decides.
    trial = _entry(rules, head, origin, rules.layers, rules.budget, loads)
    steps, tokens_per_step = steps_of(trial, False, files, ranks)
    first = resolve_group([trial], files, target, None, ranks)[0]
    model = _reference_model(rules.reference, first, read_hf)
    counts = _layers_of_rounds(rules, head, file, model, steps * tokens_per_step)
    budget = Given("steps", steps, rules.budget.origin)
    entries = [_entry(rules, head, origin, layers, budget, loads) for layers in counts]
    rounds = resolve_group(entries, files, target, None, ranks)
    problems = [problem for before, after in pairwise(rounds) for problem in cannot_follow(before, after)]
    problems += _cannot_compare(rounds[0])
    if problems:
        raise ConfigError(report(problems, files))
    if model is not None:
        _require_fit(rounds[0], model, rules.reference, file, head.content["reference"].line)
    return RoundsPlan(file, target, tuple(rounds), rules.reference, imports, model, rules.margin)


def _read_rules(file: Path, head: PlanHead) -> _Rules:
    fields, problems = head.content, list[Problem]()
    problems += unknown_keys(fields, ROUND_KEYS, file, "inheritune")
    reference = fields["reference"].value if "reference" in fields else None
    if not isinstance(reference, str):
        problems.append(problem_at(file, fields, "reference", "expected the folder of the larger model"))
    given = {key: Given(key, fields[key].plain(), origin_of(file, fields, key)) for key in COUNTS if key in fields}
    problems += [
        problem_with(item, "expected a whole number above 0") for item in given.values() if not is_count(item.value)
    ]
    problems += [
        problem_at(file, fields, key, "expected a number of layers")
        for key in ("layers", "layers_per_round")
        if key not in fields
    ]
    budgets = [given[key] for key in ("steps", "tokens") if key in given]
    if len(budgets) != 1:
        origin = origin_of(file, fields, "layers")
        problems.append(Problem(f"{origin} inheritune", "expected either tokens or steps: a round's budget", origin))
    margin = fields["margin"].value if "margin" in fields else 0.0
    if not isinstance(margin, int | float) or isinstance(margin, bool) or margin < 0:
        problems.append(problem_at(file, fields, "margin", "expected a number of at least 0 [nats per token]"))
    keys, wrong = read_keys(file, fields, "keys")
    first, wrong_first = read_keys(file, fields, "inherit", "inherit")
    later, wrong_later = read_keys(file, fields, "grow", "grow")
    problems += [*wrong, *wrong_first, *wrong_later]
    problems += _set_by_rounds([*keys.values(), *first.values(), *later.values(), *head.command_line.values()])
    if problems:
        raise ConfigError(report(problems, [file, *head.files]))

    def count(key: str) -> int | None:
        return int(float(str(given[key].value))) if key in given else None

    return _Rules(
        Path(str(reference)),
        count("layers") or 0,
        count("layers_per_round") or 0,
        budgets[0],
        count("max_layers"),
        count("max_tokens"),
        float(str(margin)),
        first,
        later,
        keys,
    )


def _set_by_rounds(given: Sequence[Given]) -> list[Problem]:
    """Lists keys that a plan decides: the place of a round, and of `inherit` all but the sublayers."""
    return [
        problem_with(
            item, "follows from the plan: rounds inherit the reference's first layers and append its next; remove it"
        )
        for item in given
        if item.key in SET_BY_ROUNDS or (item.key.startswith("inherit.") and item.key != "inherit.sublayers")
    ]


def _entry(rules: _Rules, head: PlanHead, origin: Origin, layers: int, budget: Given, loads: Path) -> StageEntry:
    """Returns a round: the first inherits, later ones append."""
    is_first = layers == rules.layers
    follows: dict[str, YamlValue] = {"num_layers": layers}
    follows |= (
        {"inherit.operator": "inherit"}
        if is_first
        else {"grow.operator": "append", "grow.reference": str(loads), "grow.schedule": "restart"}
    )
    schedule = rules.later.get("grow.schedule")
    if budget.key == "steps" and (schedule is None or schedule.value == "restart"):
        follows["lr_decay_iters"] = budget.value
    settings = {key: Given(key, value, Origin("derived", key)) for key, value in follows.items()}
    own = rules.first if is_first else rules.later
    place = {key: item for key, item in settings.items() if key in SET_BY_ROUNDS}
    files = {key: item for key, item in head.given.items() if item.value is not None}
    given = {**settings, **files, **rules.keys, **own, **head.command_line, **place}
    return StageEntry(f"{layers}_layers", origin, budget, is_first, given, str(loads) if is_first else None)


def _reference_model(reference: Path, first: Stage, read_hf: READ_HF) -> ModelConfig | None:
    """Returns the model of the reference; None where nothing is there yet."""
    if is_hf_folder(reference):
        return read_hf(reference, first.loaded.run.model)
    if not (reference / "manifest.json").exists() and not any(True for _ in checkpoint_paths(reference)):
        return None
    checkpoint = whole_checkpoint(reference)
    return checkpoint.config.model.model_copy(update={"padded_vocab_size": checkpoint.state.padded_vocab_size})


def _layers_of_rounds(
    rules: _Rules, head: PlanHead, file: Path, model: ModelConfig | None, tokens_per_round: int
) -> list[int]:
    fields = head.content
    depth = None if model is None else model.num_layers
    last = rules.max_layers or depth
    problems = []
    if last is None:
        message = (
            f"missing, and {rules.reference} holds no checkpoint that says how many layers it has. Give it, or train "
            "or copy the reference first"
        )
        problems.append(problem_at(file, fields, "max_layers", message))
    elif depth is not None and last > depth:
        problems.append(
            problem_at(file, fields, "max_layers", f"{rules.reference} has {depth} layers; use at most as many")
        )
    elif rules.layers > last:
        whose = "max_layers" if rules.max_layers else f"the layers of {rules.reference}"
        problems.append(problem_at(file, fields, "layers", f"{rules.layers} is above {whose}: {last}"))
    counts = []
    if last is not None and not problems:
        counts = [*range(rules.layers, last, rules.layers_per_round), last]
    if rules.max_tokens is not None:
        counts = counts[: rules.max_tokens // tokens_per_round]
        if not counts and not problems:
            message = f"a round reads {tokens_per_round:,} tokens, so that not one fits; give more, or shorter rounds"
            problems.append(problem_at(file, fields, "max_tokens", message))
    if problems:
        raise ConfigError(report(problems, [file, *head.files]))
    return counts


def _cannot_compare(first: Stage) -> list[Problem]:
    """Lists what keeps losses from being measured on validation data."""
    run, origins = first.loaded.run, first.loaded.origins
    problems = []
    if not run.training.eval_iters:
        origin = origins["training.eval_iters"]
        message = "losses are compared on the first eval_iters batches of the validation data; use 1 or more"
        problems.append(Problem(f"{origin} eval_iters: 0", message, origin))
    data = run.data
    if data.data_path is not None and not split_shares(data.split)[1]:
        origin = origins["data.split"]
        message = "losses are compared on validation data; give it a second share, as in '969, 30, 1'"
        problems.append(Problem(f"{origin} split: {data.split}", message, origin))
    return problems


def _require_fit(first: Stage, model: ModelConfig, reference: Path, file: Path, line: int) -> None:
    run = first.loaded.run
    where = f"{file}:{line} reference: {reference}"
    rows = run.model.padded_vocab_size
    if rows not in (None, model.padded_vocab_size) and not run.model.mask_padded_vocab:
        raise ConfigError(
            f"{where}: its embedding has {model.padded_vocab_size} rows, and the rounds' {rows} (padded_vocab_size). "
            "Use the reference's tokenizer."
        )
    if run.inherit is None:
        raise ValueError("the first round inherits")
    try:
        require_inheritance(model, run.model, run.inherit)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
