"""NaN and infinity on one rank of two: every policy, with and without clipping."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.configs import TOKENFORMER
from tests.helpers.faults import not_finite
from tests.helpers.records import records
from tests.helpers.runs import Finished, run_ranks
from tests.helpers.tensor_files import assert_same_checkpoint

# 8 samples a step: two micro batches of two on each of two ranks.
BASE: dict[str, Any] = TOKENFORMER | {
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 8,
    "checkpoint_factor": 2,
    "eval_iters": 0,
    "log_batch_hashes": True,
}
BAD_STEP, BAD_RANK = 5, 1


def run(config: Path, *overrides: str, kind: str = "loss", steps: tuple[int, ...] = (BAD_STEP,)) -> Finished:
    return run_ranks(config, *overrides, ranks=2, before=not_finite, arguments=(kind, list(steps), BAD_RANK))


def some_in_the_cover(*cases: tuple[Any, ...]) -> list[Any]:
    """Combines every clipping and precision with each of `cases`; a few of them run in `make test`."""
    combinations = [(*case, clip, dtype) for case in cases for clip in (1.0, 0.0) for dtype in ("fp32", "bfloat16")]
    return [
        pytest.param(*values, marks=[] if number % 3 == 0 else [pytest.mark.full])
        for number, values in enumerate(combinations)
    ]


KINDS = (("loss",), ("infinite loss",), ("gradient",))


@pytest.mark.parametrize(("kind", "clip", "dtype"), some_in_the_cover(*KINDS))
def test_stop(kind: str, clip: float, dtype: str, write_config: Callable[..., Path]) -> None:
    config = write_config(BASE, gradient_clipping=clip, precision=dtype)
    finished = run(config, kind=kind)
    assert finished.codes == [1, 1], finished.output
    # Step 5 begins at sample 32; in each micro batch of 4, rank 1 has the last two.
    what = (
        "gradient on rank 1, from training samples 34-35, 38-39"
        if kind == "gradient"
        else ("loss on rank 1, from training samples 38-39")
    )
    assert f"NonFiniteError: step 5: NaN or infinity in the {what}." in finished.output
    assert "Traceback" not in finished.output
    folder = config.with_suffix("")
    assert (folder / "latest").read_text() == "global_step4\n"
    assert not (folder / "global_step6").exists()
    assert list(records(folder, "train/lm_loss")) == [1, 2, 3, 4]


@pytest.mark.parametrize(("kind", "clip", "dtype"), some_in_the_cover(*KINDS))
def test_skipping_and_rolling_back_agree(kind: str, clip: float, dtype: str, write_config: Callable[..., Path]) -> None:
    """A rollback to step 4 that goes on with the samples after the bad ones takes the very steps that are taken after
    the bad one is left out; only their numbers differ by one."""
    settings = {"gradient_clipping": clip, "precision": dtype}
    skipping = write_config(BASE, "skipping", **settings, non_finite_policy="skip")
    left_out = run(skipping, kind=kind)
    assert left_out.codes == [0, 0], left_out.output
    assert "1 of 10: left out" in left_out.output
    rolling = write_config(BASE, "rolling", **settings, non_finite_policy="rollback", train_iters=7)
    rolled_back = run(rolling, kind=kind)
    assert rolled_back.codes == [0, 0], rolled_back.output
    assert "1 of 10: rolling back to the last checkpoint" in rolled_back.output

    skipped, rolled = skipping.with_suffix(""), rolling.with_suffix("")
    for key in ("train/lm_loss", "train/grad_norm", "train/learning_rate"):
        ours, theirs = records(skipped, key), records(rolled, key)
        assert list(theirs) == list(range(1, 8)), "no step is recorded twice"
        assert [ours[step] for step in (1, 2, 3, 4, 6, 7, 8)] == list(theirs.values()), key
    hashes = [
        [json.loads(line)["sha256"] for line in (folder / "batch_hashes.jsonl").read_text().splitlines()]
        for folder in (skipped, rolled)
    ]
    assert len(set(hashes[0])) == 8
    assert hashes[1] == hashes[0][:4] + hashes[0][5:], "the samples of the bad step are not seen again"

    assert records(skipped, "train/skipped_steps") == dict.fromkeys(range(1, 5), 0) | dict.fromkeys(range(5, 9), 1)
    assert records(skipped, "train/lm_loss")[BAD_STEP] is None, "a step that is left out has no loss"
    assert records(skipped, "consumed_tokens")[8] == records(rolled, "consumed_tokens")[7] == 8 * 8 * 16
    states = [json.loads((skipped / "global_step8" / "state.json").read_text())]
    states.append(json.loads((rolled / "global_step7" / "state.json").read_text()))
    assert [(state["schedule_steps"], state["non_finite_steps"]) for state in states] == [(7, 1), (7, 1)]
    assert [state["consumed_train_samples"] for state in states] == [64, 64]


def test_a_skip_is_the_same_after_a_resume(write_config: Callable[..., Path]) -> None:
    whole = write_config(BASE, "whole", non_finite_policy="skip")
    assert run(whole).codes == [0, 0]
    parts = write_config(BASE, "parts", non_finite_policy="skip", auto_resume=True)
    assert run(parts, "exit_interval=6").codes == [75, 75]
    assert run_ranks(parts, ranks=2).codes == [0, 0]
    assert_same_checkpoint(whole.with_suffix("") / "global_step8", parts.with_suffix("") / "global_step8")


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_budget_that_is_used_up(policy: str, write_config: Callable[..., Path]) -> None:
    """It counts over interruptions: two bad steps before one and another after it are three."""
    config = write_config(
        BASE, non_finite_policy=policy, non_finite_budget=2, auto_resume=True, exit_interval=4, checkpoint_factor=1
    )
    assert run(config, kind="gradient", steps=(2, 4) if policy == "skip" else (2, 3)).codes == [75, 75]
    finished = run(config, kind="gradient", steps=(2,))
    assert finished.codes == [1, 1], finished.output
    assert "It is number 3 of this run, and `non_finite_budget` allows 2" in finished.output


def test_rolling_back_without_a_checkpoint(write_config: Callable[..., Path]) -> None:
    config = write_config(BASE, non_finite_policy="rollback")
    finished = run(config, kind="gradient", steps=(2,))
    assert finished.codes == [1, 1]
    assert "step 2 was not finite, and there is no checkpoint to roll back to" in finished.output


def test_a_stage_of_a_pipeline(write_config: Callable[..., Path]) -> None:
    """A gradient that is bad on the first stage alone."""
    config = write_config(BASE, pipe_parallel_size=2, train_micro_batch_size_per_gpu=4)
    finished = run_ranks(config, ranks=2, before=not_finite, arguments=("gradient", [BAD_STEP], 0))
    assert finished.codes == [1, 1], finished.output
    assert "step 5: NaN or infinity in the gradient on rank 0, from training samples 32-35, 36-39." in finished.output


def test_losses_are_finite_otherwise(write_config: Callable[..., Path]) -> None:
    """What the tests above inject is all that is not finite."""
    config = write_config(BASE)
    assert run(config, steps=()).codes == [0, 0]
    assert all(math.isfinite(loss) for loss in records(config.with_suffix(""), "train/lm_loss").values())
