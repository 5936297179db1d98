"""A run's YAML from those that GPT-NeoX keeps in its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron.checkpointing.convert.neox.neox_files import open_neox
from megatron.checkpointing.convert.neox.neox_model import model_of
from megatron.config.yaml.problems import report
from megatron.config.yaml.yaml_files import read_yaml, write_new_yaml
from megatron.errors import ConfigError

HEADER = """# The configuration that {folder} was trained with, and the vocabulary rows that it has.
# After tools/ckpts/import_neox.py, train on with `load: <output_dir>` and `finetune: true`.
"""
OF_THE_OLD_RUN = ("load", "save", "iteration", "finetune", "pretrain_partial_init", "eval_ckpt", "padded_vocab_size")


def write_config(source: Path, path: Path) -> None:
    """Merges the YAMLs in `source`'s folder `configs` into `path`.

    Raises CheckpointError for a checkpoint that is not NeoX's, ConfigError when it holds no YAMLs, or `path` exists.
    """
    files = open_neox(source)
    found = model_of(files)
    folder = (files.path if files.path.is_dir() else files.path.parent) / "configs"
    configs = sorted(file for file in folder.glob("*") if file.suffix in (".yml", ".yaml", ".json"))
    if not configs:
        known = found.settings | {"padded_vocab_size": found.vocabulary_rows}
        raise ConfigError(
            f"{files.path} holds no `configs` folder with NeoX's YAMLs, and the tensors do not tell heads, positions, "
            f"activation, residual or tokenizer. Give --config_file, with what they do tell: {_as_keys(known)}."
        )
    keys: dict[str, Any] = {}
    for file in configs:
        entries, problems = read_yaml(file)
        if problems:
            raise ConfigError(report(problems, configs))
        keys |= {key: entry.plain() for key, entry in entries.items() if key not in OF_THE_OLD_RUN}
    keys["padded_vocab_size"] = found.vocabulary_rows
    write_new_yaml(path, HEADER.format(folder=files.path), keys)


def _as_keys(settings: dict[str, Any]) -> str:
    return yaml.safe_dump(settings, default_flow_style=True, sort_keys=False, width=1000).strip().strip("{}")
