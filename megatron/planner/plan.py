"""The plan of a run: memory of its ranks, time of its steps, disk of its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import BatchConfig
from megatron.planner.disk import CheckpointDisk, checkpoint_disk
from megatron.planner.implementation import Implementation, implementation_of
from megatron.planner.memory import RankMemory, rank_memory
from megatron.planner.stages import Stage, stages_of
from megatron.planner.step_time import Placement, StepTime, step_time
from megatron.planner.target import Target


@dataclass(frozen=True)
class Plan:
    """Prediction for one layout of a run."""

    run: RunConfig
    batch: BatchConfig
    world_size: int
    padded_vocab_size: int
    target: Target
    stages: tuple[Stage, ...]
    memory: tuple[RankMemory, ...]
    """Memory of a rank of each stage that differs from the others."""
    step: StepTime

    @property
    def largest(self) -> RankMemory:
        """Returns the memory of a rank of the stage that needs most."""
        return max(self.memory, key=lambda memory: memory.peak)

    @property
    def fits(self) -> bool:
        """Tells whether all ranks have room."""
        return self.target.fits(self.largest.peak + self.largest.not_returned)

    @property
    def days(self) -> float:
        """Returns the time of all training steps, without evaluation and saves [days]."""
        return self.run.training.train_iters * self.step.total / 86400

    @property
    def tokens_per_second(self) -> float:
        """Returns the throughput of all ranks [tokens/s]."""
        return self.batch.global_batch_size * self.run.model.seq_length / self.step.total

    @property
    def megawatt_hours(self) -> float | None:
        """Returns the energy of the devices [MWh]; None where their power is not known."""
        watts = self.target.rates.watts
        return None if watts is None else watts * self.world_size * self.days * 24 / 1e6

    def disk(self) -> CheckpointDisk:
        """Returns the disk of the schedule's checkpoints."""
        by_stage = {memory.stage: memory.files for memory in self.memory}
        files = sum(by_stage[_representative(stage, self.stages)] for stage in self.stages)
        return checkpoint_disk(self.run, files * self.run.parallel.model_parallel_size)


def make_plan(
    run: RunConfig,
    batch: BatchConfig,
    world_size: int,
    padded_vocab_size: int,
    target: Target,
    implementation: Implementation | None = None,
) -> Plan:
    """Predicts a run on `world_size` ranks.

    `implementation` is that of the run, if it is known already. Raises ConfigError where a pipeline stage is left
    without parameters.
    """
    implementation = implementation or implementation_of(run, on_gpu=target.on_gpu)
    stages = stages_of(run.model, run.parallel, padded_vocab_size)
    different = [stage for stage in stages if _representative(stage, stages) == stage.index]
    memory = tuple(rank_memory(run, batch, stage, padded_vocab_size, implementation) for stage in different)
    placement = Placement(world_size, target.per_machine)
    step = step_time(run, batch, different, padded_vocab_size, implementation, target.rates, placement)
    return Plan(run, batch, world_size, padded_vocab_size, target, stages, memory, step)


def _representative(stage: Stage, stages: tuple[Stage, ...]) -> int:
    """Returns the first stage, apart from both ends, that holds as much: those after it have less in flight."""
    if stage.index in (0, len(stages) - 1):
        return stage.index
    return next(other.index for other in stages[1:-1] if other.parameters == stage.parameters)
