"""Plans a run from its command line, and refuses one that no machine could run. Needs no torch."""

from __future__ import annotations

from megatron.config.checks.layout import tensor_sizes
from megatron.config.command_line import CommandLine
from megatron.config.effective_config import fewest_ranks
from megatron.config.load_config import LoadedConfig
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import BatchConfig
from megatron.data.tokenizer import build_tokenizer, padded_vocab_size
from megatron.errors import ConfigError, UserError
from megatron.planner.devices import CPU, LARGEST
from megatron.planner.implementation import implementation_of
from megatron.planner.layouts import layouts
from megatron.planner.memory import ACTIVATIONS, LOGITS, RECOMPUTED, SCRATCH, RankMemory, rank_memory
from megatron.planner.plan import Plan, make_plan
from megatron.planner.report import fit_sentence, overrides, plan_text
from megatron.planner.stages import stages_of
from megatron.planner.target import Target, find_target

ASSUMED_VOCABULARY = 50304
"""Rows of the embedding where neither configuration nor tokenizer tells: GPT-NeoX's and TokenFormer's."""
ABSURD = 4
"""Times the memory of the largest device that a rank may need before a run is refused: far beyond any error of the
prediction."""
GIB = 2**30
ENDLESS = 10**9
"""Data-parallel ranks among which the optimizer's state vanishes."""
OF_A_BATCH = (ACTIVATIONS, LOGITS, RECOMPUTED, SCRATCH)


def plan_report(loaded: LoadedConfig, command: CommandLine) -> str:
    """Returns the plan of a run, with the layouts that fit.

    Raises ConfigError for an unknown device, and for ranks among which the batch or the model does not divide.
    """
    plan, assumptions = _plan(loaded, command)
    found = layouts(plan.run, plan.batch.global_batch_size, plan.world_size, plan.padded_vocab_size, plan.target)
    return "\n".join([f"plan of {', '.join(map(str, loaded.sources))}", plan_text(plan, found, assumptions)])


def memory_findings(loaded: LoadedConfig, command: CommandLine) -> list[str]:
    """Returns a line on a rank's memory, for --check, and one that warns where it is too little."""
    try:
        loaded.batch(_world_size(loaded, command))
    except ConfigError:
        return []  # the summary says it
    plan, _ = _plan(loaded, command)
    names_device = command.device is not None or plan.target.on_gpu
    # Without a name, and on a machine without GPUs, ranks may be meant for another one.
    if not names_device and plan.largest.peak <= LARGEST.memory_gib * GIB:
        return [
            f"memory: a rank needs {plan.largest.peak / GIB:,.2f} GiB; --device NAME, or --plan, tells where it fits"
        ]
    if plan.fits:
        return [f"memory {fit_sentence(plan)}"]
    found = layouts(plan.run, plan.batch.global_batch_size, plan.world_size, plan.padded_vocab_size, plan.target)
    best = next((one for one in found if one.fits), None)
    remedy = f"the fastest layout that fits: {overrides(best)}" if best else "no layout fits on so many ranks"
    return [f"warning: memory {fit_sentence(plan)}", f"  {remedy}; --plan has more"]


def require_plausible(loaded: LoadedConfig) -> None:
    """Raises ConfigError where a rank needs several times the memory of the largest device, on however many ranks."""
    run, micro = loaded.run, loaded.run.training.train_micro_batch_size_per_gpu or 1
    rows, _ = _vocabulary(run, ask_tokenizer=False)
    memory = _largest_rank(run, micro, rows)
    limit = LARGEST.memory_gib * GIB
    if memory.peak <= ABSURD * limit:
        return
    of_batch = sum(memory.parts.get(part, 0.0) for part in OF_A_BATCH)
    by_batch = of_batch > memory.peak / 2
    path = "training.train_micro_batch_size_per_gpu" if by_batch else "model.num_layers"
    key = path.rpartition(".")[2]
    least = _smallest(run, rows, limit)
    raise ConfigError(
        f"{loaded.origins[path]} {key}: a rank would need {memory.peak / GIB:,.0f} GiB, on however many ranks: "
        f"{', '.join(f'{size / GIB:,.0f} GiB of {part}' for part, size in _largest_parts(memory))}. The largest device "
        f"that the planner knows, {LARGEST.name}, has {LARGEST.memory_gib:,.0f} GiB. {least} Is a size mistyped?"
    )


def _largest_parts(memory: RankMemory) -> list[tuple[str, float]]:
    return [(part, size) for part, size in sorted(memory.parts.items(), key=lambda one: -one[1])[:3] if size > GIB]


def _smallest(run: RunConfig, rows: int, limit: float) -> str:
    """Finds the fewest ranks of a model, and a micro batch, with which a rank has room."""
    again = run.training.checkpoint_activations.model_copy(update={"enabled": True, "num_layers": 1})
    training = run.training.model_copy(update={"checkpoint_activations": again})
    sizes = [
        (tensor * stages, tensor, stages)
        for tensor in tensor_sizes(run)
        if tensor <= 64
        for stages in (1, 2, 4, 8, 16, 32, 64)
        if stages <= run.model.num_layers
    ]
    for _, tensor, stages in sorted(sizes):
        parallel = run.parallel.model_copy(update={"model_parallel_size": tensor, "pipe_parallel_size": stages})
        smaller = run.model_copy(update={"training": training, "parallel": parallel})
        try:
            fits = _largest_rank(smaller, 1, rows).peak <= limit
        except ConfigError:
            continue
        if fits:
            return (
                f"It would have room with model_parallel_size={tensor} pipe_parallel_size={stages} "
                "train_micro_batch_size_per_gpu=1 checkpoint_activations=true."
            )
    return "No tensor-parallel and pipeline sizes make room for it."


def _largest_rank(run: RunConfig, micro: int, rows: int) -> RankMemory:
    """Returns the memory of the rank that needs most, were there data-parallel ranks without end."""
    implementation = implementation_of(run, on_gpu=True)
    batch = BatchConfig(micro_batch_size=micro, gradient_accumulation_steps=1, data_parallel_size=ENDLESS)
    stages = stages_of(run.model, run.parallel, rows)
    ends = {stage.index: stage for stage in (stages[0], max(stages, key=lambda one: one.parameters), stages[-1])}
    found = (rank_memory(run, batch, stage, rows, implementation) for stage in ends.values())
    return max(found, key=lambda memory: memory.peak)


def _plan(loaded: LoadedConfig, command: CommandLine) -> tuple[Plan, list[str]]:
    run, world_size = _trained_model(loaded.run), _world_size(loaded, command)
    batch = loaded.batch(world_size)
    target = find_target(command.device, run.launch, world_size, run.training.precision.dtype)
    rows, assumption = _vocabulary(run, ask_tokenizer=True)
    plan = make_plan(run, batch, world_size, rows, target)
    return plan, [*assumption, *_left_out(loaded.run, plan.target)]


def _world_size(loaded: LoadedConfig, command: CommandLine) -> int:
    launch = loaded.run.launch
    if command.world_size is not None:
        return command.world_size
    return launch.num_gpus * (launch.num_nodes or 1) if launch.num_gpus else fewest_ranks(loaded)


def _trained_model(run: RunConfig) -> RunConfig:
    """Returns the configuration with the largest model that the run has."""
    if run.grow is None or not run.grow.happens_in_training:
        return run
    # An operator needs torch, which a configuration without growth is planned without.
    from megatron.growth.target_model import grown_model

    return run.model_copy(update={"model": grown_model(run.model, run.grow.rules, **run.grow.sizes)})


def _left_out(run: RunConfig, target: Target) -> list[str]:
    """Says what of a run the plan does not count."""
    lines = [f"{implementation_of(run, on_gpu=target.on_gpu)}"]
    if run.distillation is not None:
        lines.append("not counted: memory and time of the teacher")
    if run.grow is not None and run.grow.happens_in_training:
        lines.append("the model as it is after growth, from the first step on")
    if run.speedups.torch_compile == "on":
        lines.append("not counted: what torch_compile saves")
    if not target.on_gpu and target.name == CPU:
        lines.append("a CPU's memory counts once it is written to")
    return lines


def _vocabulary(run: RunConfig, *, ask_tokenizer: bool) -> tuple[int, list[str]]:
    """Returns the rows of the embedding, and a line where they are not known."""
    if run.model.padded_vocab_size is not None:
        return run.model.padded_vocab_size, []
    reason = "padded_vocab_size is not given"
    if ask_tokenizer:
        try:
            return padded_vocab_size(run.model, build_tokenizer(run.data.tokenizer).vocab_size), []
        except UserError:
            reason += ", and there is no tokenizer yet"
    multiple = run.model.make_vocab_size_divisible_by
    rows = -(-ASSUMED_VOCABULARY // multiple) * multiple
    return rows, [f"a vocabulary of {rows:,}: {reason}"]
