"""Takes the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from torch import Tensor

from megatron.mpu.random import seed_dropout
from megatron.training.callback import Callback, told_of_the_end
from megatron.training.progress import Step
from megatron.training.stability.non_finite import must_roll_back
from megatron.training.training_context import TrainingContext, TrainingRun


class Ending(Enum):
    """Reason for which the loop has ended."""

    FINISHED = "all steps are taken"
    STOPPED = "a signal or a limit has ended the run, and what it did is saved"
    ROLL_BACK = "the run is to go on from its last checkpoint"
    GROW = "the model is to grow, and the run to go on with the larger one"


def train_steps(context: TrainingContext, callbacks: Sequence[Callback]) -> Ending:
    """Takes optimizer steps until train_iters, calling every callback after each, and keeps `context.progress`.

    A request to stop takes effect after a step, so that every start makes progress. Raises NonFiniteError for a step
    that is not finite, as far as the policy says so.
    """
    run, progress, training = context.run, context.progress, context.run.config.training
    batches = run.data.read("train", progress.consumed_train_samples)
    for callback in callbacks:
        batches = callback.wrap_batches(batches)
    with run.weights.overlapping(), told_of_the_end(callbacks):
        context.stop.early.begin()
        run.after_growth.set_step(progress.iteration)
        for callback in callbacks:
            callback.start()
        while progress.iteration < training.train_iters:
            with run.watchdog.step(progress.iteration + 1):
                seed_dropout(training.seed, progress.iteration, run.parallel)
                learning_rate = run.engine.lr_scheduler.learning_rate
                taught = batches if run.distillation is None else run.distillation.attach(batches)
                if run.elastic is None:
                    loss = run.engine.train_batch(taught)
                else:
                    run.elastic.begin_step(progress.iteration)
                    loss = run.engine.train_batch(run.elastic.repeat(taught))
                    run.elastic.end_step()
            context.stop.early.close()
            progress.iteration += 1
            progress.consumed_train_samples += run.batch.global_batch_size
            progress.training_flops += run.step_flops
            if must_roll_back(run.guard, progress, training.non_finite, run.batch):
                return Ending.ROLL_BACK
            run.after_growth.set_step(progress.iteration)
            is_last = progress.iteration == training.train_iters
            growth = run.next_growth
            step = Step(
                progress.iteration,
                _losses(loss, run),
                learning_rate,
                is_last=is_last,
                ends_run=is_last or _exits_at(progress.iteration, training.exit_interval),
                grows=growth is not None and growth.is_due(progress.iteration, context.consumed_tokens) and not is_last,
                left_out=run.guard.step_was_left_out,
            )
            for callback in callbacks:
                callback.after_step(step)
            if (step.ends_run or context.stop.agreed) and not is_last:
                return Ending.STOPPED
            if step.grows:
                return Ending.GROW
    return Ending.FINISHED


def _losses(loss: Tensor, run: TrainingRun) -> dict[str, Tensor]:
    """Returns a step's losses by metric: the cross entropy alone, or the whole loss and its terms."""
    total = loss.detach().float()
    terms = {"lm_loss": total} if run.distillation is None else {"loss": total} | run.distillation.step_losses()
    return terms if run.elastic is None else terms | run.elastic.losses(total, terms["lm_loss"])


def _exits_at(iteration: int, exit_interval: int | None) -> bool:
    return exit_interval is not None and iteration % exit_interval == 0
