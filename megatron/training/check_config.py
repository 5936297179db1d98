"""Checks of a training run's configuration against what it names on disk, before any rank starts."""

from __future__ import annotations

from megatron.config.command_line import CommandLine
from megatron.config.load_config import LoadedConfig
from megatron.config.sections.section_fields import fields
from megatron.config.yaml.problems import DEFAULT
from megatron.errors import CheckpointError, ConfigError
from megatron.growth.check_config import require_growable
from megatron.training.plan_run import memory_findings, require_plausible


def require_trainable(loaded: LoadedConfig, command: CommandLine | None = None) -> list[str]:
    """Returns what a run grows to, whom it is distilled from and what memory it takes, a line each, for its user.

    Raises ConfigError and CheckpointError, naming the line of the YAML, when it cannot be so.
    """
    if loaded.run.reading is not None:
        key = next(path for path in loaded.origins if path.startswith("reading.") and loaded.origins[path] != DEFAULT)
        raise ConfigError(
            f"{loaded.origins[key]} {fields()[key].key}: training reads all parameter tokens; the key is for "
            "evaluation and generation. To train smaller models as well, use a section `elastic`; to train one alone, "
            "use tools/ckpts/extract.py."
        )
    require_plausible(loaded)
    found = require_growable(loaded)
    if command is not None and command.check:
        found += memory_findings(loaded, command)
    if loaded.run.distillation is None:
        return found
    # A teacher's checkpoint needs torch, which a configuration without one is checked without.
    from megatron.training.distillation.find_teacher import find_teacher

    where = loaded.origins["distillation.teacher"]
    try:
        teacher = find_teacher(loaded.run, "sizes")
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"{where} {error}") from error
    return found if teacher is None else [*found, teacher.summary(loaded.run)]
