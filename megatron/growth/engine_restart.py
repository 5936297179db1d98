"""The engine's part of a checkpoint for a run whose schedule or moments begin anew."""

from __future__ import annotations

from dataclasses import replace

from megatron.checkpointing.states.read_zero_files import EngineState
from megatron.config.learning_rate import lr_at
from megatron.config.sections.training import TrainingConfig


def restarted_engine(
    engine: EngineState, training: TrainingConfig, *, schedule: bool, moments: bool, steps: bool = False
) -> EngineState:
    """Returns what the engine goes on with when `schedule`, `moments` or the count of `steps` begin anew.

    The optimizer's groups have the next learning rate of `training`, and may count steps.
    """
    counters, again = dict(engine.counters), dict[str, float]()
    rate: float | None = None
    if schedule:
        counters["lr_scheduler"] = {**counters["lr_scheduler"], "num_steps": 0}
        peak, lr_schedule = training.optimizer.lr, training.lr_schedule
        rate = lr_at(0, peak=peak, schedule=lr_schedule, train_iters=training.train_iters)
    if steps:
        counters |= {"global_steps": 0, "global_samples": 0, "skipped_steps": 0}
    if moments:
        again["step"] = 0
    groups = {}
    for name, group in engine.hyperparameters.items():
        own = again if rate is None else again | {"lr": rate * group.get("lr_ratio", 1.0)}
        groups[name] = {key: own.get(key, value) for key, value in group.items()}
    return replace(engine, counters=counters, hyperparameters=groups)
