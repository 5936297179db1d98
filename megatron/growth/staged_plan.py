"""Plans of staged runs: train, grow, train on, each stage a difference to the one before it.

A plan is a YAML file:

    config_files: [124M.yml]          # of the first stage; paths count from the plan's folder
    folder: runs/progressive          # a run's folder for each stage, by its name
    stages:
      124M:
        tokens: 300e9                 # or steps
      354M:
        tokens: 30e9
        restart: true                 # its own schedule, optimizer and data; without, the run goes on
        keys:                         # as in any configuration; what is not named stays as it was
          qkv_slot_num: 2140
          grow: {operator: zero_key}  # how the model of the stage before becomes this one's

A stage that goes on counts its steps from where the one before has ended, and shares its learning-rate schedule, whose
end is that of the last such stage. A stage that restarts begins at step 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron.checkpointing.states.same_model import free_model_fields
from megatron.config.load_config import LoadedConfig, load_given
from megatron.config.merge_files import flatten, gather
from megatron.config.sections.growth import ModelSizes
from megatron.config.value_types import did_you_mean
from megatron.config.yaml.problems import Given, Origin, Problem, YamlValue, problem_with, report, show
from megatron.config.yaml.yaml_files import LocatedValue, read_yaml
from megatron.errors import ConfigError
from megatron.growth.require_growth import require_growth

PLAN_KEYS = ("config_files", "folder", "stages")
STAGE_KEYS = ("tokens", "steps", "restart", "keys")
SET_BY_PLAN = frozenset(
    {"train_iters", "exit_interval", "save", "load", "iteration", "finetune", "auto_resume", "log_dir",
     "pretrain_partial_init", "grow.at_step", "grow.at_tokens", "grow.qkv_slot_num", "grow.proj_slot_num",
     "grow.ffn_slot_num", "grow.num_layers", "grow.factor"}
)  # fmt: skip
"""Keys that follow from a stage's place, budget and sizes."""
GROWING_FIELDS = frozenset({"param_tokens", "num_layers"})


@dataclass(frozen=True)
class Stage:
    """One training run of a plan."""

    name: str
    loaded: LoadedConfig
    """The whole configuration with which it trains."""
    given: Mapping[str, Given]
    """The same as flat YAML keys."""
    origin: Origin
    """Its place in the plan."""
    tokens_per_step: int
    first_step: int
    """Steps that are done when it begins [steps]; 0 for one that restarts."""
    last_step: int
    """Step after which it ends [steps]."""
    restarts: bool
    """Whether it takes only weights from the stage before."""

    @property
    def folder(self) -> Path:
        """Returns the run's folder."""
        return Path(str(self.loaded.run.checkpoint.save))

    @property
    def keys(self) -> dict[str, YamlValue]:
        """Returns the configuration as flat YAML keys."""
        return {key: item.value for key, item in self.given.items()}

    @property
    def config_file(self) -> Path:
        """Returns the YAML file to write `keys` to."""
        return self.folder.with_name(f"{self.folder.name}.yml")

    @property
    def tokens(self) -> int:
        """Returns the training tokens of this stage alone [tokens]."""
        return (self.last_step - self.first_step) * self.tokens_per_step

    @property
    def sizes(self) -> ModelSizes:
        """Returns the sizes that growth changes."""
        return ModelSizes.of(self.loaded.run.model)


@dataclass(frozen=True)
class StagedPlan:
    """Stages in the order in which they train."""

    file: Path
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class _Entry:
    """A stage as the plan writes it."""

    name: str
    origin: Origin
    budget: Given
    restarts: bool
    given: Mapping[str, Given]


def load_plan(
    file: Path, overrides: Sequence[str] = (), *, folder: Path | None = None, ranks: int | None = None
) -> StagedPlan:
    """Reads a plan, and checks every stage and that each can follow the one before.

    `overrides` are key=value for every stage; `folder` takes the place of the plan's. The batch of every stage is
    checked for `ranks`, or for its num_gpus, unless both are None. Raises ConfigError with files and lines.
    """
    entries, base, plan_folder = _read(file, overrides)
    target = folder or plan_folder
    stages: list[Stage] = []
    for group in _groups(entries):
        stages += _resolve_group(group, [file, *base], target, stages[-1] if stages else None, ranks)
    problems = [problem for before, after in pairwise(stages) for problem in _cannot_follow(before, after)]
    if problems:
        raise ConfigError(report(problems, [file, *base]))
    return StagedPlan(file, tuple(stages))


def _read(file: Path, overrides: Sequence[str]) -> tuple[list[_Entry], list[Path], Path]:
    content, problems = read_yaml(file)
    if problems:
        raise ConfigError(report(problems, [file]))
    problems = list(_unknown(content, PLAN_KEYS, file, "a plan"))
    names = content["config_files"].value if "config_files" in content else None
    stages = content["stages"].value if "stages" in content else None
    folder = content["folder"].value if "folder" in content else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        problems.append(_at(file, content, "config_files", "expected the YAML files of the first stage, as a list"))
    if not isinstance(stages, dict) or not stages:
        problems.append(_at(file, content, "stages", "expected stages by name, in the order in which they train"))
    if not isinstance(folder, str):
        problems.append(_at(file, content, "folder", "expected a folder for the stages' runs"))
    if problems or not isinstance(names, list) or not isinstance(stages, dict):
        raise ConfigError(report(problems, [file]))
    base = [file.parent / str(name) for name in names]
    gathered = gather(base, overrides)
    given, problems = gathered.given, gathered.problems
    command_line = {key: item for key, item in given.items() if item.origin.kind == "command line"}
    problems += [_set_by_plan(item) for key, item in command_line.items() if key in SET_BY_PLAN]
    entries: list[_Entry] = []
    for name, stage in stages.items():
        entry, wrong = _read_stage(file, name, stage, given)
        problems += wrong
        if entry is not None:
            given = {**entry.given, **command_line}
            entries.append(replace(entry, given=given, restarts=entry.restarts or not entries))
    if problems:
        raise ConfigError(report(problems, [file, *base]))
    return entries, base, Path(str(folder))


def _read_stage(
    file: Path, name: str, stage: LocatedValue, before: Mapping[str, Given]
) -> tuple[_Entry | None, list[Problem]]:
    origin = Origin("file", name, file, stage.line)
    if not isinstance(stage.value, dict):
        return None, [Problem(f"{origin} {name}", f"expected some of {', '.join(STAGE_KEYS)}", origin)]
    fields = stage.value
    problems = list(_unknown(fields, STAGE_KEYS, file, f"stage {name}"))
    if Path(name).name != name:
        problems.append(Problem(f"{origin} {name}", "expected a name that a folder can have", origin))
    budgets = [
        Given(key, fields[key].plain(), _origin(file, fields, key)) for key in ("tokens", "steps") if key in fields
    ]
    if len(budgets) != 1:
        problems.append(Problem(f"{origin} {name}", "expected either tokens or steps: the stage's budget", origin))
    problems += [problem_with(item, "expected a whole number above 0") for item in budgets if not _is_count(item.value)]
    restart = fields["restart"].value if "restart" in fields else False
    if not isinstance(restart, bool):
        problems.append(_at(file, fields, "restart", "expected true or false"))
    given = dict(before)
    keys = fields["keys"].value if "keys" in fields else {}
    if not isinstance(keys, dict):
        problems.append(_at(file, fields, "keys", "expected keys of a configuration and their values"))
        keys = {}
    for item in flatten(keys, file):
        if isinstance(item, Problem):
            problems.append(item)
        elif item.key in SET_BY_PLAN:
            problems.append(_set_by_plan(item))
        else:
            given[item.key] = item
    if problems:
        return None, problems
    return _Entry(name, origin, budgets[0], bool(restart), given), []


def _is_count(value: YamlValue) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 1 and float(value).is_integer()


def _set_by_plan(item: Given) -> Problem:
    return problem_with(
        item, "follows from the stage's place, sizes, budget (tokens or steps) and `restart`; remove it"
    )


def _unknown(content: Mapping[str, LocatedValue], known: Sequence[str], file: Path, what: str) -> Iterator[Problem]:
    for key in content:
        if key not in known:
            hint = did_you_mean(key, known) or f"; {what} has {', '.join(known)}"
            yield _at(file, content, key, f"no key of {what}{hint}")


def _origin(file: Path, content: Mapping[str, LocatedValue], key: str) -> Origin:
    return Origin("file", key, file, content[key].line if key in content else 0)


def _at(file: Path, content: Mapping[str, LocatedValue], key: str, message: str) -> Problem:
    if key not in content:
        return Problem(f"{file}: missing key {key}", message, Origin("file", key, file))
    origin = _origin(file, content, key)
    return Problem(f"{origin} {key}", message, origin)


def _groups(entries: Sequence[_Entry]) -> Iterator[list[_Entry]]:
    """Yields the stages whose steps are counted in one: one that restarts, and those that go on from it."""
    group: list[_Entry] = []
    for entry in entries:
        if entry.restarts and group:
            yield group
            group = []
        group.append(entry)
    yield group


def _resolve_group(
    group: Sequence[_Entry], files: Sequence[Path], folder: Path, before: Stage | None, ranks: int | None
) -> list[Stage]:
    """Returns the stages of one schedule; `before` is the stage that the first of them takes its weights from."""
    budgets = [_steps(entry, before is not None or index > 0, files, ranks) for index, entry in enumerate(group)]
    total = sum(steps for steps, _ in budgets)
    stages: list[Stage] = []
    done = 0
    for entry, (steps, tokens_per_step) in zip(group, budgets, strict=True):
        save = folder / entry.name
        settings: dict[str, YamlValue] = {"train_iters": total, "save": str(save), "auto_resume": True}
        if done + steps < total:
            # The schedule and the data order are those of all steps, of which this stage takes its part.
            settings["exit_interval"] = done + steps
        previous = stages[-1] if stages else before
        if previous is not None:
            settings |= {"load": str(previous.folder), "finetune": entry.restarts}
        stages.append(_stage(entry, settings, files, tokens_per_step, done, done + steps))
        done += steps
    return stages


def _stage(
    entry: _Entry,
    settings: Mapping[str, YamlValue],
    files: Sequence[Path],
    tokens_per_step: int,
    first_step: int,
    last_step: int,
) -> Stage:
    given = _with_settings(entry, settings)
    loaded = _load(entry, given, files)
    return Stage(entry.name, loaded, given, entry.origin, tokens_per_step, first_step, last_step, entry.restarts)


def _with_settings(entry: _Entry, settings: Mapping[str, YamlValue]) -> dict[str, Given]:
    given = {key: item for key, item in entry.given.items() if key not in SET_BY_PLAN}
    return given | {key: Given(key, value, Origin("derived", key)) for key, value in settings.items()}


def _load(entry: _Entry, given: Mapping[str, Given], files: Sequence[Path]) -> LoadedConfig:
    with _of_stage(entry):
        return load_given(given, files)


@contextmanager
def _of_stage(entry: _Entry) -> Iterator[None]:
    """Names the stage in a ConfigError of the body."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"stage {entry.name} ({entry.origin}): {error}") from error


def _steps(entry: _Entry, follows: bool, files: Sequence[Path], ranks: int | None) -> tuple[int, int]:
    """Returns the optimizer steps of a stage, the last of which may go beyond its tokens, and the tokens of a step."""
    # The batch decides the steps, and is read from a configuration: of as few steps as a schedule can have.
    decay = entry.given.get("lr_wsd_decay_iters")
    settings: dict[str, YamlValue] = {"train_iters": 1 if decay is None else decay.value, "save": entry.name}
    loaded = _load(entry, _with_settings(entry, settings | ({"load": "the stage before"} if follows else {})), files)
    ranks = loaded.run.launch.num_gpus or ranks
    batch = loaded.run.training.train_batch_size
    if ranks is not None or batch is None:
        with _of_stage(entry):
            batch = loaded.batch(ranks or 1).global_batch_size
    tokens_per_step = batch * loaded.run.model.seq_length
    if not isinstance(entry.budget.value, int | float):
        raise ValueError(f"{entry.budget} is no number")
    budget = int(entry.budget.value)
    return (budget if entry.budget.key == "steps" else -(-budget // tokens_per_step)), tokens_per_step


def _cannot_follow(before: Stage, after: Stage) -> Iterator[Problem]:
    """Yields what keeps a stage from going on with the weights, and unless it restarts the run, of the one before."""
    yield from _other_model(before, after)
    yield from _fewer(before, after)
    vocabulary = {f"data.tokenizer.{name}" for name in type(after.loaded.run.data.tokenizer).model_fields}
    why = "an embedding belongs to its vocabulary"
    yield from _differing(before, after, {*vocabulary, "model.padded_vocab_size"}, why)
    yield from _cannot_grow(before, after)
    if after.restarts:
        return
    run = after.loaded.run
    if not run.training.lr_schedule.override_lr_scheduler:
        schedule = {f"training.lr_schedule.{name}" for name in type(run.training.lr_schedule).model_fields}
        why = "a stage that goes on shares the schedule; set it for all of them, or `override_lr_scheduler: true`"
        yield from _differing(before, after, {"training.optimizer.lr", *schedule}, why)
    if not run.checkpoint.allow_changed_data:
        data = {f"data.{name}" for name in ("data_path", "train_data_paths", "train_data_weights", "split")}
        why = "a stage that goes on reads the same data; use `allow_changed_data: true`, or `restart: true`"
        yield from _differing(before, after, {"model.seq_length", "training.seed", *data}, why)


def _other_model(before: Stage, after: Stage) -> Iterator[Problem]:
    theirs, ours = (stage.loaded.run.model.model_dump() for stage in (before, after))
    free = free_model_fields(after.loaded.run.model) | GROWING_FIELDS
    fixed = {f"model.{name}" for name in ours if name not in free}
    if theirs["param_tokens"] is not None and ours["param_tokens"] is not None:
        fixed.add("model.param_tokens.theta")
    yield from _differing(before, after, fixed, "growth adds parameter tokens and layers, and keeps everything else")


def _fewer(before: Stage, after: Stage) -> Iterator[Problem]:
    paths = {name: f"model.param_tokens.{name}" for name in ("qkv", "proj", "ffn")}
    for name, path in {**paths, "num_layers": "model.num_layers"}.items():
        old, new = getattr(before.sizes, name), getattr(after.sizes, name)
        if old is not None and new is not None and new < old:
            message = f"stage {after.name} cannot follow {before.name}, which has {old}: growth adds. Use {old} or more"
            yield _located(after, path, message)


def _cannot_grow(before: Stage, after: Stage) -> Iterator[Problem]:
    """Yields what the operator itself refuses, such as a scale of the scores that would change the function."""
    grow, models = after.loaded.run.grow, [stage.loaded.run.model for stage in (before, after)]
    if before.sizes == after.sizes or any(True for _ in (*_other_model(before, after), *_fewer(before, after))):
        return
    if grow is None:
        message = (
            f"stage {after.name} has other sizes than {before.name}; say how to grow: `grow: {{operator: zero_key}}`"
        )
        yield Problem(f"{after.origin} {after.name}", message, after.origin)
        return
    try:
        require_growth(models[0], models[1], grow.rules)
    except ConfigError as error:
        key = str(error).partition(":")[0]
        given = after.given.get(key)
        origin = after.origin if given is None else given.origin
        yield Problem(f"{origin} stage {after.name}", str(error), origin)


def _differing(before: Stage, after: Stage, paths: set[str], why: str) -> Iterator[Problem]:
    for path in sorted(paths):
        old, new = (_value(stage, path) for stage in (before, after))
        if old != new:
            yield _located(
                after, path, f"stage {after.name} cannot follow {before.name}, where it is {show(old)}: {why}"
            )


def _value(stage: Stage, path: str) -> Any:
    value: Any = stage.loaded.run
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _located(stage: Stage, path: str, message: str) -> Problem:
    """Returns a problem at the line that sets a value, or, where none does, at the stage's."""
    origin = stage.loaded.origins.get(path, stage.origin)
    key = origin.key or path.rpartition(".")[2]
    where = origin if origin.kind in ("file", "command line") else stage.origin
    return Problem(f"{where} {key}: {show(_value(stage, path))}", message, where)
