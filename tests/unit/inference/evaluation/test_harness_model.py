"""Our adapter against lm-eval's own on the exported model, and against itself in other batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.load_config import load_config
from megatron.config.sections.run_config import RunConfig
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import DataError
from megatron.inference.evaluation.evaluate_models import evaluate_checkpoints, evaluate_hf_model
from megatron.inference.evaluation.harness.evaluation_worker import EvaluationWorker
from megatron.inference.evaluation.harness.harness_model import HarnessModel
from megatron.inference.evaluation.harness.response_cache import ResponseCache
from megatron.inference.evaluation.huggingface_model import load_hf_model
from megatron.loaded_model.rank_pool import RankPool
from megatron.mpu.context import ParallelContext
from tests.helpers.eval_models import CONTEXT
from tests.helpers.eval_results import read_record
from tests.helpers.eval_tasks import TASKS
from tests.helpers.tiny_checkpoints import VOCAB

CPU = torch.device("cpu")
TOLERANCE = 1e-4
PAIRS = [
    ("Beautiful is better", " than ugly."),
    ("Beautiful is better", " than implicit"),
    ("Beautiful is better ", "than ugly."),
    ("", "Explicit is better than implicit."),
    ("one token: ", "a"),
    ("one token: ", "b"),
    ("one token: ", "c"),
    ("much longer than the model's context " * 4, " the rest of it"),
    ("a", "b" * CONTEXT),
    ("\u00fcber \u4e16\u754c", " \u00e9t\u00e9"),
]
TEXTS = ["", "a", "short", "Simple is better than complex. " * 3, "x" * CONTEXT, "y" * (CONTEXT + 1), "z" * 3 * CONTEXT]
PROMPTS = ["a", "Now is better", "Namespaces are one honking great idea " * 3]


@pytest.fixture
def run_config(
    eval_config: Path, eval_checkpoint: Checkpoint, eval_tasks: Path, tmp_path: Path
) -> Callable[..., RunConfig]:
    """The configuration of an evaluation of all our tasks, with overrides."""

    def load(*overrides: str) -> RunConfig:
        paths = [f"eval_include_path={eval_tasks}", f"eval_output={tmp_path}", f"eval_tasks=[{', '.join(TASKS)}]"]
        given = {override.partition("=")[0] for override in overrides}
        defaults = [path for path in paths if path.partition("=")[0] not in given]
        return load_config([eval_config], [*defaults, *overrides]).run

    return load


def adapter(run: RunConfig, cache: Path | None = None) -> HarnessModel:
    """Our adapter on one rank, its checkpoint loaded."""
    tokenizer = build_tokenizer(run.data.tokenizer)
    worker = EvaluationWorker(run, tokenizer, ParallelContext.single(), CPU)
    pool = RankPool(ParallelContext.single(), worker)
    pool.request("load", [None], iteration=None)
    length, sequences = worker.model.context_length, worker.limit.sequences
    return HarnessModel(pool.request, worker.prompt_tokenizer, length, sequences, ResponseCache(cache))


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    """Requests as tasks make them."""
    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


def stop_at(*until: str, **more: Any) -> dict[str, Any]:
    return {"until": list(until), "max_gen_toks": 24, **more}


@pytest.fixture(scope="module")
def theirs(eval_export: Path, eval_config: Path) -> HFLM:
    """lm-eval's adapter on the exported folder."""
    return load_hf_model(load_config([eval_config], [f"eval_hf_model={eval_export}"]).run.evaluation)


def test_log_likelihoods_are_those_of_transformers(run_config: Callable[..., RunConfig], theirs: HFLM) -> None:
    requests = instances("loglikelihood", PAIRS)
    found = adapter(run_config()).loglikelihood(requests)
    for ours, reference in zip(found, theirs.loglikelihood(requests), strict=True):
        assert ours[0] == pytest.approx(reference[0], abs=TOLERANCE)
        assert ours[1] == reference[1]


def test_the_likeliest_token_alone_is_greedy(run_config: Callable[..., RunConfig], theirs: HFLM) -> None:
    requests = [(("", ""), [5, 9], [token]) for token in range(VOCAB.actual)]
    found = adapter(run_config())._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in found].count(True) == 1
    assert max(found)[1]
    assert [greedy for _, greedy in theirs._loglikelihood_tokens(requests)] == [greedy for _, greedy in found]


def test_rolling_log_likelihoods_are_those_of_transformers(run_config: Callable[..., RunConfig], theirs: HFLM) -> None:
    requests = instances("loglikelihood_rolling", [(text,) for text in TEXTS[1:]])
    found = adapter(run_config()).loglikelihood_rolling(requests)
    assert found == pytest.approx(theirs.loglikelihood_rolling(requests), rel=1e-6, abs=TOLERANCE)


def test_the_empty_text_is_certain(run_config: Callable[..., RunConfig]) -> None:
    assert adapter(run_config()).loglikelihood_rolling(instances("loglikelihood_rolling", [("",)])) == [0.0]


@pytest.mark.parametrize("options", [stop_at(), stop_at("e"), stop_at("is", "\n\n", " ")], ids=str)
def test_generated_texts_are_those_of_transformers(
    options: dict[str, Any], run_config: Callable[..., RunConfig], theirs: HFLM
) -> None:
    requests = instances("generate_until", [(prompt, options) for prompt in PROMPTS])
    assert adapter(run_config()).generate_until(requests) == theirs.generate_until(requests)


def test_samples_differ_and_can_be_repeated(run_config: Callable[..., RunConfig]) -> None:
    requests = instances("generate_until", [(PROMPTS[0], stop_at(do_sample=True, temperature=1.0))] * 3)
    first = adapter(run_config()).generate_until(requests)
    assert len(set(first)) == 3
    assert adapter(run_config("eval_batch_size=1")).generate_until(requests) == first


def test_metrics_are_those_of_lm_eval(run_config: Callable[..., RunConfig], eval_export: Path, tmp_path: Path) -> None:
    (ours,) = evaluate_checkpoints(run_config(), ParallelContext.single(), CPU)
    theirs = evaluate_hf_model(run_config(f"eval_hf_model={eval_export}", f"eval_output={tmp_path / 'theirs.json'}"))
    mine, reference = read_record(ours), read_record(theirs)
    assert mine["metrics"].keys() == reference["metrics"].keys()
    assert {task for task, _ in mine["metrics"]} == set(TASKS)
    for name, (value, error) in mine["metrics"].items():
        assert value == pytest.approx(reference["metrics"][name][0], rel=TOLERANCE), name
        expected = reference["metrics"][name][1]
        assert error == (None if expected is None else pytest.approx(expected, rel=TOLERANCE)), name
    for field in ("n-samples", "n-shot", "versions", "higher_is_better", "group_subtasks"):
        assert mine["record"][field] == reference["record"][field]


@pytest.mark.parametrize("size", ["1", "3", "auto"])
def test_batches_make_no_difference(size: str, run_config: Callable[..., RunConfig]) -> None:
    pairs, texts = instances("loglikelihood", PAIRS), instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    prompts = instances("generate_until", [(prompt, stop_at("q")) for prompt in PROMPTS])
    one, eight = adapter(run_config(f"eval_batch_size={size}")), adapter(run_config("eval_batch_size=8"))
    for ours, reference in zip(one.loglikelihood(pairs), eight.loglikelihood(pairs), strict=True):
        assert ours == (pytest.approx(reference[0], abs=1e-5), reference[1])
    assert one.loglikelihood_rolling(texts) == pytest.approx(eight.loglikelihood_rolling(texts), rel=1e-6)
    assert one.generate_until(prompts) == eight.generate_until(prompts)


@pytest.mark.parametrize(
    ("options", "said"), [({"max_gen_toks": CONTEXT}, f"asks for {CONTEXT}"), ({"num_beams": 4}, "num_beams")]
)
def test_generation_that_is_not_possible(
    options: dict[str, Any], said: str, run_config: Callable[..., RunConfig]
) -> None:
    with pytest.raises(DataError, match=said):
        adapter(run_config()).generate_until(instances("generate_until", [("a", {"until": [], **options})]))


def test_cached_answers_are_not_computed_again(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    pairs, texts = instances("loglikelihood", PAIRS), instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    prompts = instances("generate_until", [(prompt, stop_at()) for prompt in PROMPTS])

    def answer(model: HarnessModel) -> list[Any]:
        return [model.loglikelihood(pairs), model.loglikelihood_rolling(texts), model.generate_until(prompts)]

    path = tmp_path / "cache" / "answers.jsonl"
    first = answer(adapter(run_config(), path))
    with path.open("r+") as file:  # as after a crash: the last line is cut off
        file.truncate(path.stat().st_size - 5)
    asked: list[int] = []
    model = adapter(run_config(), path)
    request = model.request
    model.request = lambda method, items, **options: asked.append(len(items)) or request(method, items, **options)  # type: ignore[func-returns-value]
    assert answer(model) == first
    assert asked == [1]
    assert answer(adapter(run_config(), path)) == first
    assert asked == [1]


def test_log_likelihoods_are_sums_over_tokens(run_config: Callable[..., RunConfig]) -> None:
    """P(abc | x) = P(a | x) P(b | xa) P(c | xab)."""
    model = adapter(run_config())
    whole, *parts = model.loglikelihood(
        instances("loglikelihood", [("x", "abc"), ("x", "a"), ("xa", "b"), ("xab", "c")])
    )
    assert whole[0] == pytest.approx(math.fsum(part[0] for part in parts), abs=1e-5)
