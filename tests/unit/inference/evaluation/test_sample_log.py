"""--log_samples: a line for each document, the same as lm-eval writes of the exported model; resamples as lm-eval's."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import pytest
from lm_eval.models.huggingface import HFLM

import eval as eval_script
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.load_config import load_config
from megatron.config.sections.evaluation import EvaluationConfig
from megatron.errors import ConfigError, DataError
from megatron.inference.evaluation.harness.harness_tasks import load_tasks
from megatron.inference.evaluation.huggingface_model import load_hf_model
from megatron.inference.evaluation.sample_log import write_samples
from tests.helpers.eval_results import read_record
from tests.helpers.eval_tasks import TASKS


def read_log(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The logged samples, by task."""
    files = sorted(folder.glob("samples_*.jsonl"))
    names = [file.name.removeprefix("samples_").rsplit("_", 1)[0] for file in files]
    return dict(zip(names, ([json.loads(line) for line in file.open()] for file in files), strict=True))


def close(value: Any) -> Any:
    """Numbers compare within 1e-4, also where lm-eval logs them as text."""
    if isinstance(value, dict):
        return {key: close(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [close(inner) for inner in value]
    if isinstance(value, float):
        return pytest.approx(value, rel=1e-4, abs=1e-4)
    return value


def with_numbers(value: Any) -> Any:
    """The same with each text that is a number as that number."""
    if isinstance(value, list):
        return [with_numbers(inner) for inner in value]
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


@pytest.fixture(scope="module")
def theirs(eval_export: Path, eval_config: Path, eval_tasks: Path) -> tuple[HFLM, EvaluationConfig]:
    """lm-eval's adapter on the exported folder, and the configuration of all our tasks."""
    names = ", ".join(TASKS)
    overrides = [f"eval_hf_model={eval_export}", f"eval_include_path={eval_tasks}", f"eval_tasks=[{names}]"]
    config = load_config([eval_config], overrides).run.evaluation
    return load_hf_model(config), config


def test_samples_are_those_of_lm_eval(
    theirs: tuple[HFLM, EvaluationConfig],
    eval_config: Path,
    eval_checkpoint: Checkpoint,
    eval_tasks: Path,
    tmp_path: Path,
) -> None:
    """Its own evaluation, its own adapter, on the exported folder."""
    flags = ["--include_path", str(eval_tasks), "--log_samples", "--output", str(tmp_path / "ours.json")]
    assert eval_script.main([str(eval_config), *flags, "--eval_tasks", *TASKS]) == 0
    adapter, config = theirs
    tasks = load_tasks(config)
    tasks.set_seeds()
    found = lm_eval.evaluator.evaluate(adapter, tasks.content, bootstrap_iters=0, log_samples=True)
    write_samples(found["samples"], tmp_path / "theirs.json")
    ours, reference = read_log(tmp_path / "ours"), read_log(tmp_path / "theirs")
    assert ours.keys() == reference.keys() == set(TASKS)
    for task, rows in ours.items():
        for row, want in zip(rows, reference[task], strict=True):
            for answers in ("resps", "filtered_resps"):
                assert with_numbers(row.pop(answers)) == close(with_numbers(want.pop(answers))), (task, row["doc_id"])
            assert row == close(want)
    record = read_record(tmp_path / "ours.json")["record"]
    assert "samples" not in record
    assert record["task_hashes"].keys() == set(TASKS)
    mean = sum(row["acc"] for row in ours["zen_choice"]) / len(ours["zen_choice"])
    assert read_record(tmp_path / "ours.json")["metrics"]["zen_choice", "acc"][0] == pytest.approx(mean)


def test_a_log_that_could_not_be_written_is_told(tmp_path: Path) -> None:
    """lm-eval's writer warns and goes on."""
    (tmp_path / "r").write_text("a file where the folder is to be")
    rows = [{"arguments": [["a"]], "resps": [["b"]], "filtered_resps": ["b"], "target": "c"}]
    with pytest.raises(DataError, match=r"r/samples_zen_.*0 of 1 samples"):
        write_samples({"zen": rows}, tmp_path / "r.json")


def test_resamples_are_as_many_as_lm_evals_and_can_be_fewer(
    eval_config: Path, eval_checkpoint: Checkpoint, eval_tasks: Path, tmp_path: Path
) -> None:
    default = inspect.signature(lm_eval.evaluator.evaluate).parameters["bootstrap_iters"].default
    assert EvaluationConfig().bootstrap_iters == default
    errors = {}
    for count in ("2000", "0"):
        flags = ["--include_path", str(eval_tasks), "--bootstrap_iters", count, "--output", str(tmp_path / "r.json")]
        assert eval_script.main([str(eval_config), *flags, "--eval_tasks", "zen_last_word"]) == 0
        found = read_record(tmp_path / "r.json")
        assert found["record"]["config"]["bootstrap_iters"] == int(count)
        errors[count] = found["metrics"]["zen_last_word", "perplexity"][1]
    assert errors["2000"] is not None and errors["2000"] > 0
    assert errors["0"] is None
    with pytest.raises(ConfigError, match="eval_bootstrap_iters"):
        load_config([eval_config], ["eval_bootstrap_iters=1"])
