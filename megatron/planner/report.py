"""A plan in words and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron.config.batch_triangle import equation
from megatron.config.model_size import count_parameters
from megatron.planner.layouts import layout_keys
from megatron.planner.memory import RankMemory
from megatron.planner.plan import Plan

GIB = 2**30
SHOWN = 5
"""Layouts in the table."""


def plan_text(plan: Plan, alternatives: Sequence[Plan], assumptions: Iterable[str]) -> str:
    """Returns the report of a plan, with the layouts that could take its place, best first."""
    target = plan.target
    machines = -(-plan.world_size // target.per_machine)
    where = f"{plan.world_size} x {target.name}, {min(target.per_machine, plan.world_size)} a machine"
    lines = [
        f"{count_parameters(plan.run.model, plan.padded_vocab_size):,} parameters on {where}"
        + (f", {machines:,} machines" if machines > 1 else ""),
        equation(plan.batch, plan.run.model.seq_length),
        "",
        *_memory_lines(plan),
        "",
        *_time_lines(plan),
        "",
        *_disk_lines(plan),
        "",
        *_layout_lines(plan, alternatives),
        "",
        f"assumed ({target.rates.source})",
        *(f"  {line}" for line in (*target.rates.assumptions, *target.assumptions, *assumptions)),
    ]
    return "\n".join(lines)


def fit_sentence(plan: Plan) -> str:
    """Says in a sentence whether a rank's memory is enough."""
    most, usable = plan.largest, plan.target.usable
    stage = f" of stage {most.stage}" if len(plan.stages) > 1 else ""
    needs = f"a rank{stage} needs {_gib(most.peak)}, most of it in the {_when(most)}"
    if most.not_returned:
        needs += f", and may keep {_gib(most.not_returned)} of freed tensors"
    room = f"{_gib(max(usable, 0.0))} of {_gib(plan.target.memory)} that a rank of {plan.target.name} can use"
    return f"fits: {needs}; there are {room}" if plan.fits else f"does not fit: {needs}, and there are only {room}"


def overrides(plan: Plan) -> str:
    """Returns a plan's layout as words of a command line."""
    return " ".join(f"{key}={_yaml(value)}" for key, value in layout_keys(plan).items())


def _memory_lines(plan: Plan) -> list[str]:
    by_stage = {memory.stage: memory for memory in (plan.memory[0], plan.largest, plan.memory[-1])}
    columns = [by_stage[stage] for stage in sorted(by_stage)]
    names = list(dict.fromkeys(part for memory in columns for part in memory.parts))
    heads = [f"stage {memory.stage}" if len(plan.stages) > 1 else "" for memory in columns]
    lines = [f"{'memory of a rank [GiB]':<34}" + "".join(f"{head:>12}" for head in heads)]
    for name in names:
        lines.append(f"  {name:<32}" + "".join(f"{memory.parts.get(name, 0.0) / GIB:>12.2f}" for memory in columns))
    lines.append(f"  {'most at a time':<32}" + "".join(f"{memory.peak / GIB:>12.2f}" for memory in columns))
    lines.append(f"  {'when':<32}" + "".join(f"{_when(memory):>12}" for memory in columns))
    freed = max(memory.not_returned for memory in plan.memory)
    if freed:
        lines.append(f"  and up to {_gib(freed)} of freed tensors, which the C library may not return")
    copies = max(memory.host_copy for memory in plan.memory)
    if copies:
        ranks = min(plan.target.per_machine, plan.world_size)
        lines.append(f"  host memory for async_save: {_gib(copies)} a rank, at most {_gib(copies * ranks)} a machine")
    return [*lines, f"  {fit_sentence(plan)}"]


def _when(memory: RankMemory) -> str:
    return memory.peak_moment


def _time_lines(plan: Plan) -> list[str]:
    step, training = plan.step, plan.run.training
    lines = [f"time of a step{'':<20}{'seconds':>12}"]
    for name, seconds in sorted(step.parts.items(), key=lambda part: -part[1]):
        lines.append(f"  {name:<32}{seconds:>12.3f}{seconds / step.total:>7.0%}")
    rate = step.model_flops / step.total / plan.world_size / 1e12
    lines.append(f"  {'a step':<32}{step.total:>12.3f}   {plan.tokens_per_second:,.0f} tokens/s")
    lines.append(f"  {rate:,.3g} TFLOP/s of the model on each rank, without what is computed again")
    hours = plan.days * 24 * plan.world_size
    unit = "GPU hours" if plan.target.on_gpu else "rank hours"
    energy = "" if plan.megawatt_hours is None else f", {_energy(plan.megawatt_hours)}"
    lines.append(
        f"the run: {training.train_iters:,} steps in {_duration(plan.days)}, {hours:,.0f} {unit}{energy}; "
        "evaluation and saves come on top"
    )
    return lines


def _disk_lines(plan: Plan) -> list[str]:
    disk = plan.disk()
    if not disk.is_saved:
        return [f"checkpoints: none, for `save` is not set; one would take {_gib(disk.each)}"]
    return [
        f"checkpoints: {disk.saves:,} of {_gib(disk.each)}, {disk.kept:,} kept at the end; at most {_gib(disk.peak)} "
        f"on disk at a time, {_gib(disk.written)} written in all"
    ]


def _layout_lines(plan: Plan, alternatives: Sequence[Plan]) -> list[str]:
    fitting = [one for one in alternatives if one.fits]
    if not fitting:
        smallest = min(alternatives, key=lambda one: one.largest.peak, default=None)
        least = (
            "the model does not split over them"
            if smallest is None
            else f"the smallest, {overrides(smallest)}, needs {_gib(smallest.largest.peak)} a rank"
        )
        return [f"layouts: none fits on {plan.world_size} ranks with this batch; {least}"]
    lines = [
        f"layouts that fit: {len(fitting):,} of {len(alternatives):,}; the fastest",
        f"  {'tensor':>6} {'pipe':>5} {'data':>6} {'micro':>6} {'accum.':>7}  {'computed again':<15}"
        f"{'GiB':>8}{'s/step':>10}",
    ]
    for one in _distinct(fitting)[:SHOWN]:
        lines.append(_layout_row(one))
    best = fitting[0]
    lines += ["the fastest, as keys to paste"]
    return [*lines, *(f"  {key}: {_yaml(value)}" for key, value in layout_keys(best).items())]


def _distinct(plans: Sequence[Plan]) -> list[Plan]:
    """Leaves out plans that differ from a faster one by the micro batch alone."""
    seen: dict[tuple[object, ...], Plan] = {}
    for plan in plans:
        again = plan.run.training.checkpoint_activations
        sizes = plan.run.parallel
        key = (
            sizes.model_parallel_size,
            sizes.pipe_parallel_size,
            sizes.sequence_parallel,
            again.enabled,
            again.scores,
        )
        seen.setdefault(key, plan)
    return list(seen.values())


def _layout_row(plan: Plan) -> str:
    sizes, batch, again = plan.run.parallel, plan.batch, plan.run.training.checkpoint_activations
    tensor = f"{sizes.model_parallel_size}{'s' if sizes.sequence_parallel else ''}"
    recomputed = "layers" if again.enabled else "scores" if again.scores else "nothing"
    return (
        f"  {tensor:>6} {sizes.pipe_parallel_size:>5} {batch.data_parallel_size:>6} {batch.micro_batch_size:>6} "
        f"{batch.gradient_accumulation_steps:>7}  {recomputed:<15}"
        f"{plan.largest.peak / GIB:>8.1f}{plan.step.total:>10.3f}"
    )


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size < 100 * GIB else f"{size / GIB:,.0f} GiB"


def _energy(megawatt_hours: float) -> str:
    return f"{megawatt_hours:,.1f} MWh" if megawatt_hours >= 1 else f"{megawatt_hours * 1000:,.1f} kWh"


def _duration(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    return f"{days * 24:.1f} hours" if days * 24 >= 1 else f"{days * 1440:.1f} minutes"
