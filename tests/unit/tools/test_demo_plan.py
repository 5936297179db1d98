"""The model that a time and a text are enough for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron.config.load_config import load_config
from tests.helpers.forkserver import ROOT
from tools.demo_plan import (
    LADDER,
    MOST_PASSES,
    REPETITIONS,
    Cost,
    Size,
    choose_size,
    learning_rate,
    make_plan,
    with_values,
    worth,
)

COSTS = {
    size: Cost(size.num_layers * 12 * size.hidden_size**2, size.num_layers * 72 * size.hidden_size**2)
    for size in LADDER
}
PLENTY = 10**12


def test_the_learning_rate_is_that_of_the_demo_and_of_the_published_model() -> None:
    assert [learning_rate(width) for width in (128, 768)] == [3e-3, 6e-4]
    power = math.log(5.0) / math.log(6.0)
    assert learning_rate(256) == pytest.approx(3e-3 * 2.0**-power, rel=0.02)


def test_repeated_text_is_worth_less_and_less() -> None:
    """Against the integral of the law's own rate: the n-th pass teaches exp(-(n - 1) / R) of the first."""
    for passes in (0.5, 1.0, 4.0, 16.0, 100.0):
        taught = min(passes, 1.0)
        for step in range(round(1000 * max(passes - 1.0, 0.0))):
            taught += math.exp(-(step + 0.5) / 1000 / REPETITIONS) / 1000
        assert worth(passes * 1e6, 1e6) == pytest.approx(taught * 1e6, rel=1e-6)


def test_more_time_chooses_a_larger_model_that_is_fed() -> None:
    chosen = [choose_size(COSTS, 1e12, seconds, PLENTY) for seconds in (0.1, 1, 10, 100, 1000, 10_000, 1e9)]
    assert chosen[0] == LADDER[0]
    assert chosen[-1] == LADDER[-1]
    sizes = [COSTS[size].parameters for size in chosen]
    assert sizes == sorted(sizes)
    for seconds, size in ((100, chosen[3]), (1000, chosen[4])):
        fed = [each for each in LADDER if seconds * 1e12 / COSTS[each].flops_per_token >= 20 * COSTS[each].parameters]
        assert size == max(fed, key=lambda each: COSTS[each].parameters)


def test_a_short_text_keeps_the_model_small_and_the_run_short() -> None:
    assert choose_size(COSTS, 1e15, 1e6, text_tokens=10_000) == LADDER[0]
    plan = make_plan(LADDER[0], COSTS[LADDER[0]], 0.01, 1e6, text_tokens=10_000, tokens_per_step=2000)
    assert plan.steps == MOST_PASSES * 10_000 // 2000
    assert "16 passes over the text" in plan.reasons[2]


def test_steps_fill_the_time() -> None:
    plan = make_plan(LADDER[3], COSTS[LADDER[3]], 0.5, 100.0, PLENTY, 2048)
    assert plan.steps == 200
    assert "what fits into 1m 40s" in plan.reasons[2]
    with pytest.raises(ValueError, match="20 steps of 5 s fit, and at least 50 are needed"):
        make_plan(LADDER[3], COSTS[LADDER[3]], 5.0, 100.0, PLENTY, 2048)


@pytest.mark.parametrize("size", LADDER, ids=str)
def test_every_plan_is_a_configuration(size: Size, tmp_path: Path) -> None:
    plan = make_plan(size, COSTS[size], 0.5, 1000.0, PLENTY, 2048)
    file = tmp_path / "demo.yml"
    file.write_text(with_values((ROOT / "configs" / "demo.yml").read_text(), plan.keys()))
    run = load_config([file]).run
    assert (run.model.hidden_size, run.training.train_iters) == (size.hidden_size, 2000)
    assert run.training.optimizer.lr == learning_rate(size.hidden_size)
    assert run.model.param_tokens.ffn == 4 * size.hidden_size


def test_a_value_keeps_its_place_and_a_key_that_is_missing_is_an_error() -> None:
    text = "a: 1\nb:\n  lr: 2  # peak\nmin_lr: 3\n"
    assert with_values(text, {"lr": 5, "a": '["\\\\1", "x"]'}) == 'a: ["\\\\1", "x"]\nb:\n  lr: 5\nmin_lr: 3\n'
    with pytest.raises(KeyError):
        with_values(text, {"c": 1})
