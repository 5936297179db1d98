"""Loads a checkpoint's universal form into an engine of any layout and precision."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron.checkpointing.engine.flat_partitions import grouped_fragments
from megatron.checkpointing.states.parameter_layout import fit_vocabulary
from megatron.checkpointing.states.read_zero_files import LOSS_SCALE, MASTER
from megatron.checkpointing.states.universal_files import OPTIMIZER_FILE, parameter_folder
from megatron.checkpointing.store.safe_load import load_tensors
from megatron.config.optimizer import Implementation, OptimizerConfig, facts_of
from megatron.errors import CheckpointError
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import local_shard, parameter_spec

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


def load_universal(
    engine: PipelineEngine,
    universal: Path,
    context: ParallelContext,
    section: OptimizerConfig,
    *,
    vocab_size: int,
    same_precision: bool,
) -> None:
    """Loads weights, moments, counters and schedule from the folder `universal`.

    `section` says which optimizer the engine has, whose moments have names of their own.
    `vocab_size` is the number of embedding rows that tokens have, padding apart. The state of fp16's loss scale is
    loaded only into a run of the `same_precision`. Hyperparameters stay the engine's. Raises CheckpointError when a
    file is damaged or unsafe, or a parameter has another shape.

    DeepSpeed's engine does it but for the optimizer. Its loader for that one unpickles freely, fails on a rank whose
    partition of a parameter group has no parameter, and takes one group's weight decay for another's where stages
    have different groups.
    """
    engine.optimizer._load_universal_checkpoint = partial(
        _load_optimizer,
        engine.optimizer,
        context=context,
        section=section,
        vocab_size=vocab_size,
        same_precision=same_precision,
    )
    engine._config.load_universal_checkpoint = True
    try:
        loaded, _ = engine.load_checkpoint(str(universal.parent), tag=universal.name)
    finally:
        engine._config.load_universal_checkpoint = False
        del engine.optimizer._load_universal_checkpoint
    if loaded is None:
        raise CheckpointError(
            f"{universal}: DeepSpeed found nothing to load in it. Delete the folder; it is made anew."
        )


def _load_optimizer(
    optimizer: Any,
    universal: str,
    load_optimizer_states: bool,
    load_from_fp32_weights: bool,
    *,
    context: ParallelContext,
    section: OptimizerConfig,
    vocab_size: int,
    same_precision: bool,
) -> None:
    """Stands in for DeepSpeed's `_load_universal_checkpoint`, with its arguments."""
    folder = Path(universal)
    common = load_tensors(folder / OPTIMIZER_FILE)
    optimizer._load_global_state(
        common if same_precision else {key: value for key, value in common.items() if key not in LOSS_SCALE}
    )
    base = optimizer.optimizer
    facts = facts_of(section)
    implementation = facts.implementation_of(base, section)
    for group, fragments in zip(base.param_groups, grouped_fragments(optimizer), strict=True):
        (flat,) = group["params"]
        targets = {MASTER: flat.data}
        first = fragments[0].parameter
        kind, moments = facts.group_of(parameter_spec(first)), facts.moments_of(parameter_spec(first))
        if _file(folder, optimizer, first, moments[0]).exists():
            targets |= {key: base.state[flat].setdefault(key, torch.zeros_like(flat)) for key in moments}
            if implementation.step_count is not None and kind.counts_steps:
                steps = load_tensors(_file(folder, optimizer, first, "step"))
                _set_steps(base, group, steps, implementation)
        else:
            base.state.pop(flat, None)
        for fragment in fragments:
            if fragment.size:
                for key, target in targets.items():
                    parameter = fragment.parameter
                    whole = _whole(load_tensors(_file(folder, optimizer, parameter, key)), parameter, vocab_size)
                    share = local_shard(whole, parameter_spec(parameter).shard_dim, context).flatten()
                    target[fragment.place].copy_(share[fragment.own])


def _file(universal: Path, optimizer: Any, parameter: nn.Parameter, key: str) -> Path:
    return parameter_folder(universal, optimizer.param_names[parameter]) / f"{key}.pt"


def _set_steps(
    base: torch.optim.Optimizer, group: dict[str, Any], steps: Tensor, implementation: Implementation[Any]
) -> None:
    if implementation.step_count == "group":
        group["step"] = int(steps)
        return
    (flat,) = group["params"]
    base.state[flat]["step"] = steps.clone().to(flat.device if implementation.step_on_device else "cpu")


def _whole(content: Mapping[str, Tensor], parameter: nn.Parameter, vocab_size: int) -> Tensor:
    return fit_vocabulary(content["param"], parameter_spec(parameter), vocab_size)
