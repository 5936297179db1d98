"""Describes the split of parameters to DeepSpeed's own converter, ds_to_universal.py, by patterns of their names.

Our conversion reads the split off the modules and needs none of it.
"""

from __future__ import annotations

import re
from typing import Any

from megatron.checkpointing.states.parameter_layout import ParallelSizes
from megatron.checkpointing.states.stage_parameters import StageParameter, stage_parameters
from megatron.config.sections.run_config import RunConfig
from megatron.model.causal_lm import VocabSize

KEY = "universal_checkpoint_info"
"""Entry of the `mp_rank_*` files, and the module's attribute from which DeepSpeed writes it."""
VERSION = 0.4
"""Version of the description: that of DeepSpeed 0.19.8."""


def universal_info(config: RunConfig, vocab: VocabSize) -> dict[str, Any]:
    """Returns the entry for a model, which is the same in every layout.

    DeepSpeed joins what no pattern names by rows, and refuses a pattern that names nothing.
    """
    (parameters,) = stage_parameters(config, vocab, ParallelSizes())
    return {
        "universal_checkpoint_version": VERSION,
        "tp_replicated_parameter_patterns": _patterns(parameters, shard_dim=None),
        "parameter_with_row_parallelism_patterns": _patterns(parameters, shard_dim=1),
        # A tied embedding lies on the last stage as well.
        "pipeline_replicated_parameter_patterns": [r"tied_modules\."],
    }


def _patterns(parameters: list[StageParameter], shard_dim: int | None) -> list[str]:
    names = (parameter.engine_name for parameter in parameters if parameter.spec.shard_dim == shard_dim)
    return [f"{re.escape(name)}$" for name in names]
