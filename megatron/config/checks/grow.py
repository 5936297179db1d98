"""Checks of the section `grow` and of `pretrain_partial_init`.

An operator's own requirements are its own to check (megatron/growth), since they may need torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.checks.finding import Check, Finding, nearest_multiple
from megatron.config.optimizer import facts_of
from megatron.config.sections.grow import GrowConfig
from megatron.config.sections.growth import rule_contradictions
from megatron.config.sections.run_config import RunConfig

TOKEN_SIZES = {"qkv_slot_num": "qkv", "proj_slot_num": "proj", "ffn_slot_num": "ffn"}
"""Keys of `grow` for counts of parameter tokens, and the values of the model that they are to replace."""
SIZES = (*TOKEN_SIZES, "num_layers")
_WHEN = "grow.at_step or grow.at_tokens"


def _happens_in_training(run: RunConfig) -> bool:
    return run.grow is not None and (run.grow.at_step is not None or run.grow.at_tokens is not None)


def _place_of_operator(grow: GrowConfig) -> str:
    """Returns the path of `grow.operator`, which is required: where it is missing, that alone is reported."""
    return "grow.operator" if grow.operator else ""


def _moment(run: RunConfig) -> Iterator[Finding]:
    grow = run.grow
    if grow is None or not _happens_in_training(run):
        return
    key = "at_tokens" if grow.at_step is None else "at_step"
    if grow.at_step is not None and grow.at_tokens is not None:
        yield Finding("grow.at_tokens", f"contradicts grow.at_step {grow.at_step}; keep one")
    if run.checkpoint.save is None:
        yield Finding(f"grow.{key}", "needs save: the run goes on from a checkpoint of the larger model there")
    last = run.training.train_iters
    if grow.at_step is not None and grow.at_step >= last:
        yield Finding("grow.at_step", f"is not below train_iters {last}: the run would end before it grows")
    if grow.factor is None and all(getattr(grow, name) is None for name in SIZES):
        yield Finding(f"grow.{key}", f"needs a size to grow to: {', '.join(f'grow.{name}' for name in SIZES)}, or "
                      "grow.factor")  # fmt: skip


def _start(run: RunConfig) -> Iterator[Finding]:
    """Requires what a run needs that grows at its start: a smaller checkpoint, and a place for the larger one."""
    grow, checkpoint = run.grow, run.checkpoint
    if grow is None or _happens_in_training(run):
        return
    for name in (*SIZES, "factor"):
        if getattr(grow, name) is not None:
            yield Finding(
                f"grow.{name}",
                f"needs {_WHEN}; without them the configuration's own model is the large one, and load names a "
                "checkpoint of the small one",
            )
    at = _place_of_operator(grow)
    if checkpoint.load is None:
        yield Finding(at, f"needs {_WHEN}, or load: the folder of a smaller model's checkpoint")
    elif checkpoint.save is None and not checkpoint.finetune:
        yield Finding(at, "needs save: the run goes on from a checkpoint of the larger model there")


def _sizes(run: RunConfig) -> Iterator[Finding]:
    grow, model, ranks = run.grow, run.model, run.parallel.model_parallel_size
    if grow is None or not _happens_in_training(run):
        return
    asked = {name: getattr(grow, name) for name in SIZES if getattr(grow, name) is not None}
    if grow.factor is not None:
        for name in asked:
            yield Finding(f"grow.{name}", "contradicts grow.factor, which stands for all sizes; keep one")
        return
    now = {"num_layers": model.num_layers}
    if model.param_tokens is not None:
        now |= {name: getattr(model.param_tokens, field) for name, field in TOKEN_SIZES.items()}
    for name, size in asked.items():
        if name not in now:
            yield Finding(
                f"grow.{name}", f"architecture {model.architecture} has no parameter tokens; use grow.num_layers"
            )
        elif size < now[name]:
            yield Finding(f"grow.{name}", f"is below {name} {now[name]}, and growing adds; use {now[name]} or more")
        elif name in TOKEN_SIZES and size % ranks:
            nearest = nearest_multiple(size, ranks)
            yield Finding(
                f"grow.{name}", f"does not split over model_parallel_size {ranks}; nearest valid value: {nearest}"
            )
    if asked and all(size == now.get(name) for name, size in asked.items()):
        yield Finding(f"grow.{next(iter(asked))}", "the model has this size already, so that nothing would grow")


def _rules(run: RunConfig) -> Iterator[Finding]:
    for name, message in rule_contradictions(run.grow) if run.grow is not None else ():
        yield Finding(f"grow.{name}", message)


def _frozen_rows(run: RunConfig) -> Iterator[Finding]:
    grow, optimizer = run.grow, run.training.optimizer
    if grow is not None and grow.old_rows_lr == 0 and grow.old_rows_iters and not facts_of(optimizer).freezes_rows:
        yield Finding(
            "grow.old_rows_lr",
            f"the optimizer {optimizer.type} steps whole matrices, in which frozen rows would change the steps of new "
            "ones; use a value above 0, or the optimizer Adam",
        )


def _partial_init(run: RunConfig) -> Iterator[Finding]:
    checkpoint, path = run.checkpoint, "checkpoint.pretrain_partial_init"
    if checkpoint.pretrain_partial_init is None:
        return
    if run.model.param_tokens is None:
        yield Finding(path, "only the tokenformer architecture has parameter tokens, the rows that it fills in part")
    for key in ("load", "finetune"):
        if getattr(checkpoint, key):
            yield Finding(path, f"contradicts {key}: each says what the run starts from; keep one")
    if run.grow is not None and not _happens_in_training(run):
        at = _place_of_operator(run.grow)
        yield Finding(at, "contradicts pretrain_partial_init, whose rule is the published one; keep one")


CHECKS: tuple[Check, ...] = (
    _moment,
    _start,
    _sizes,
    _rules,
    _frozen_rows,
    _partial_init,
)


def growth_comes_too_late(run: RunConfig, global_batch_size: int) -> str | None:
    """Returns why the tokens after which a run is to grow are too many for its batch [samples]; None when it grows."""
    if run.grow is None or run.grow.at_tokens is None:
        return None
    step = -(-run.grow.at_tokens // (global_batch_size * run.model.seq_length))
    last = run.training.train_iters
    if step < last:
        return None
    return f"{run.grow.at_tokens:,} tokens are read with step {step:,}, and the run ends with step {last:,}. Use fewer."
