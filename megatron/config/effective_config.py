"""Shows configurations to people: every value with its origin, a summary, and what two of them do not share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.config.batch_triangle import equation, implied_data_parallel_size
from megatron.config.load_config import LoadedConfig
from megatron.config.model_size import count_parameters
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.section_fields import fields
from megatron.config.token_share import model_of_share
from megatron.config.yaml.problems import YamlValue, show
from megatron.errors import ConfigError


def effective_text(loaded: LoadedConfig, world_size: int | None = None) -> str:
    """Shows every value with `default`, `file:line` or `derived`, and the batch as an equation.

    Without `world_size` [ranks], the batch is shown for the ranks that its three sides fix, or else for the fewest.
    """
    lines = [f"configuration from {', '.join(map(str, loaded.sources))}"]
    section = ""
    for path, origin in loaded.origins.items():
        prefix, _, name = path.rpartition(".")
        if prefix != section:
            section = prefix
            lines += ["", section]
        key = f" {origin.key}" if origin.key not in ("", name) and origin.kind != "derived" else ""
        lines.append(f"  {name:<32}{show(_value_at(loaded, path)):<32} {origin}{key}")
    if loaded.inert:
        lines += ["", "keys without effect", *(f"  {note}" for note in loaded.inert)]
    return "\n".join([*lines, "", "size", *(f"  {line}" for line in summary(loaded, world_size))])


def summary(loaded: LoadedConfig, world_size: int | None = None) -> list[str]:
    """Gives the number of parameters where the vocabulary is known, and the batch equation or why there is none."""
    model = loaded.run.model
    lines = []
    if model.padded_vocab_size is not None:
        count = count_parameters(model, model.padded_vocab_size)
        lines.append(f"{count:,} parameters with a vocabulary of {model.padded_vocab_size:,}")
        elastic = loaded.run.elastic
        for share in [] if elastic is None else reversed(elastic.smaller_shares):
            count = count_parameters(model_of_share(model, share), model.padded_vocab_size)
            lines.append(f"{count:,} of them at a share of {share:g}")
    try:
        batch = loaded.batch(fewest_ranks(loaded) if world_size is None else world_size)
    except ConfigError as error:
        return [*lines, str(error)]
    return [*lines, equation(batch, model.seq_length)]


def fewest_ranks(loaded: LoadedConfig) -> int:
    """Returns the ranks that the batch fixes, or else the fewest that the layout takes."""
    parallel = loaded.run.parallel
    data = implied_data_parallel_size(loaded.run.training) or 1
    return parallel.model_parallel_size * parallel.pipe_parallel_size * data


def _value_at(loaded: LoadedConfig, path: str) -> Any:
    value: Any = loaded.run
    for name in path.split("."):
        value = getattr(value, name)
    return value


@dataclass(frozen=True)
class ChangedValue:
    """One value that two configurations do not share; None where it is unset."""

    key: str
    """The YAML key."""
    first: YamlValue
    second: YamlValue


def changed_values(first: RunConfig, second: RunConfig) -> list[ChangedValue]:
    """Lists every key whose value differs, in the order of the sections."""
    ours, theirs = first.model_dump(mode="json"), second.model_dump(mode="json")
    found = [ChangedValue(f.key, _dumped_at(ours, f.path), _dumped_at(theirs, f.path)) for f in fields().values()]
    return [value for value in found if value.first != value.second]


def _dumped_at(dump: dict[str, Any], path: str) -> Any:
    value: Any = dump
    for name in path.split("."):
        value = None if value is None else value.get(name)
    return value
