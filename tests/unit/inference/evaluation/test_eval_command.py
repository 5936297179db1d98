"""eval.py: several checkpoints, Hugging Face models, and everything that can be wrong."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib import image

import eval as eval_script
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.errors import CheckpointError, ConfigError, DataError, EnvironmentSetupError, UserError
from megatron.inference.evaluation.harness import harness_tasks as lm_eval_tasks
from tests.helpers.eval_results import read_record
from tests.helpers.eval_tasks import FEWSHOT_EXAMPLES
from tests.helpers.tiny_checkpoints import make_checkpoint


def run_eval(config: Path, *arguments: str) -> int:
    """eval.py in this process."""
    return eval_script.main([str(config), *arguments])


def results_in(folder: Path) -> list[dict[str, Any]]:
    return [read_record(path) for path in sorted(folder.glob("*.json"))]


def test_a_learning_curve_of_several_checkpoints(eval_config: Path, eval_tasks: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yml"
    config.write_text(eval_config.read_text().replace(str(eval_config.parent / "run"), str(tmp_path / "run")))
    for iteration in (4, 12):
        make_checkpoint(config, iteration=iteration)
    output = tmp_path / "out"
    flags = ["--include_path", str(eval_tasks), "--eval_tasks", "zen_choice", "docs_text", "--output", str(output)]
    assert run_eval(config, *flags, "--iteration", "all", "--eval_results_prefix", "mine") == 0
    first, second = results_in(output)
    assert [found["record"]["model"]["iteration"] for found in (second, first)] == [4, 12]
    (curve,) = output.glob("mine_learning_curve_*.csv")
    with curve.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["iteration"], row["tokens"]) for row in rows if row["metric"] == "acc_norm"] == [
        ("4", str(4 * 8 * 64)),
        ("12", str(12 * 8 * 64)),
    ]
    values = {(int(row["iteration"]), row["task"], row["metric"]): float(row["value"]) for row in rows}
    assert values == {
        (found["record"]["model"]["iteration"], *name): value
        for found in (first, second)
        for name, (value, _) in found["metrics"].items()
    }
    assert image.imread(curve.with_suffix(".png")).std() > 0.01
    again = tmp_path / "again"
    assert run_eval(config, *flags[:-1], str(again), "--iteration", "12", "4") == 0
    assert [found["record"]["model"]["iteration"] for found in results_in(again)] == [12, 4]


def test_results_say_what_they_were_made_from(
    eval_config: Path, eval_checkpoint: Checkpoint, eval_tasks: Path, tmp_path: Path
) -> None:
    flags = ["--include_path", str(eval_tasks), "--eval_tasks", "zen_choice", "--eval_num_fewshot", "2", "--limit", "3"]
    assert run_eval(eval_config, *flags, "--output", str(tmp_path / "r.json")) == 0
    record = read_record(tmp_path / "r.json")["record"]
    manifest = (eval_checkpoint.path / "manifest.json").read_bytes()
    assert record["model"]["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert record["model"]["iteration"] == 7
    assert record["n-shot"] == {"zen_choice": 2}
    assert record["n-samples"]["zen_choice"]["effective"] == 3
    assert record["config"]["limit"] == 3
    assert record["run_config"] == json.loads(json.dumps(record["run_config"]))
    assert record["run_config"]["model"] == eval_checkpoint.config.model.model_dump(mode="json")
    assert record["packages"].keys() >= {"lm_eval", "torch"}
    assert len(record["git_hash"] or "0" * 40) == 40


def test_the_second_evaluation_takes_its_answers_from_the_cache(
    eval_config: Path, eval_checkpoint: Checkpoint, eval_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--include_path", str(eval_tasks), "--eval_tasks", "zen_choice", f"eval_cache={tmp_path / 'cache'}"]
    assert run_eval(eval_config, *flags, "--output", str(tmp_path / "1.json")) == 0
    monkeypatch.setattr("megatron.inference.evaluation.harness.evaluation_worker.EvaluationWorker.score", None)
    assert run_eval(eval_config, *flags, "--output", str(tmp_path / "2.json")) == 0
    assert read_record(tmp_path / "1.json")["metrics"] == read_record(tmp_path / "2.json")["metrics"]


@pytest.mark.parametrize(
    "names",
    [
        ["zen"],
        pytest.param(["zen_ch*", "zen_last_word.yaml"], marks=pytest.mark.full),
        ["zen_choice", "zen_choice"],
    ],
)
def test_groups_patterns_and_files(
    names: list[str], eval_config: Path, eval_checkpoint: Checkpoint, eval_tasks: Path, tmp_path: Path
) -> None:
    tasks = shutil.copytree(eval_tasks, tmp_path / "tasks")
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": False}
    group = {"group": "zen", "task": ["zen_choice", "zen_last_word"], "aggregate_metric_list": [mean]}
    (tasks / "zen_group.yaml").write_text(yaml.safe_dump(group))
    paths = [str(tasks / name) if name.endswith(".yaml") else name for name in names]
    flags = ["--include_path", str(tasks), "--output", str(tmp_path / "r.json"), "--eval_tasks", *paths]
    assert run_eval(eval_config, *flags) == 0
    found = read_record(tmp_path / "r.json")
    wanted = {"zen_choice"} if names[0] == "zen_choice" else {"zen_choice", "zen_last_word"}
    assert {task for task, _ in found["metrics"]} - {"zen"} == wanted
    if names == ["zen"]:
        parts = [found["metrics"][task, "acc"][0] for task in ("zen_choice", "zen_last_word")]
        assert found["record"]["groups"]["zen"]["acc,none"] == pytest.approx(sum(parts) / 2)


def test_a_task_that_is_asked_for_twice(eval_config: Path, eval_tasks: Path, tmp_path: Path) -> None:
    group = {"group": "zen", "task": ["zen_choice", "zen_last_word"]}
    tasks = shutil.copytree(eval_tasks, tmp_path / "tasks")
    (tasks / "zen_group.yaml").write_text(yaml.safe_dump(group))
    with pytest.raises(ConfigError, match="zen and zen_choice both ask for zen_choice"):
        run_eval(eval_config, "--include_path", str(tasks), "--eval_tasks", "zen", "zen_choice")


def one_document(folder: Path) -> dict[str, Any]:
    """The keys of a task that name its data, which is written to the folder."""
    (folder / "data.jsonl").write_text('{"text": "a"}\n')
    return {"dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}}


def broken_task(folder: Path, **settings: Any) -> Path:
    """An include path with one task, `broken`."""
    folder.mkdir()
    task = {"task": "broken", "dataset_path": "json", "output_type": "loglikelihood", "test_split": "test"}
    (folder / "broken.yaml").write_text(yaml.safe_dump(task | settings))
    return folder


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ([], ConfigError, "no task is named"),
        (["--eval_tasks"], ConfigError, "no task is named"),
        (["--eval_tasks", "hellaswagg"], ConfigError, r"no task 'hellaswagg' \(near: hellaswag"),
        (["--eval_tasks", "piqa"], DataError, "the data of piqa cannot be had.*hub is not asked.*--include_path"),
        (["--eval_tasks", "zen_choice", "--eval_num_fewshot", "6"], DataError, f"has {FEWSHOT_EXAMPLES} solved"),
        (["--eval_tasks", "zen_last_word", "--eval_num_fewshot", "20"], DataError, "19 solved examples, and 20 are"),
        (["--eval_tasks", "zen_choice", "--iteration", "1", "7"], CheckpointError, "no checkpoint of step 1. Steps"),
        (["--eval_tasks", "zen_choice", "--iteration", "99"], CheckpointError, "global_step99: no such checkpoint"),
        (["--eval_tasks", "zen_choice", "load=/nowhere"], CheckpointError, "/nowhere holds no checkpoint"),
        (["--eval_tasks", "zen_choice", "num_layers=3"], ConfigError, "another model than the configuration"),
        (["--eval_tasks", "zen_choice", "--output", "/proc/no"], ConfigError, "eval_output: /proc/no cannot be made"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(
    arguments: list[str],
    error: type[UserError],
    said: str,
    eval_config: Path,
    eval_checkpoint: Checkpoint,
    eval_tasks: Path,
) -> None:
    with pytest.raises(error, match=f"(?s){said}"):
        run_eval(eval_config, "--include_path", str(eval_tasks), *arguments)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        (
            {"dataset_kwargs": {"data_files": {"test": "/nowhere/data.jsonl"}}},
            DataError,
            "data of broken cannot be had",
        ),
        ({"output_type": "guesswork"}, DataError, "broken cannot be set up: ValueError: .*guesswork"),
    ],
)
def test_broken_tasks(
    settings: dict[str, Any], error: type[UserError], said: str, eval_config: Path, tmp_path: Path
) -> None:
    folder = broken_task(tmp_path / "tasks", **settings)
    with pytest.raises(error, match=said):
        run_eval(eval_config, "--include_path", str(folder), "--eval_tasks", "broken")


def test_tasks_run_python_only_with_consent(eval_config: Path, tmp_path: Path) -> None:
    """In a file that the task's own includes; a metric that `evaluate` would load runs code as well."""
    folder = broken_task(tmp_path / "tasks", **one_document(tmp_path), doc_to_target="a")
    trace = tmp_path / "trace"
    (folder / "base").mkdir()
    (folder / "base" / "mine.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\ntext = str\n")
    (folder / "base" / "base.yaml").write_text("doc_to_text: !function mine.text\n")
    task = folder / "broken.yaml"
    settings = yaml.safe_load(task.read_text())
    task.write_text(yaml.safe_dump(settings | {"include": "base/base.yaml"}))
    for asked in (["--include_path", str(folder), "--eval_tasks", "broken"], ["--eval_tasks", str(task)]):
        with pytest.raises(ConfigError, match=r"base\.yaml:1: this task runs Python: !function .*eval_trust_remote"):
            run_eval(eval_config, *asked)
    assert not trace.exists()
    with suppress(UserError):
        run_eval(eval_config, "--eval_tasks", str(task), "eval_trust_remote_code=true")
    assert trace.exists()
    task.write_text(yaml.safe_dump(settings | {"metric_list": [{"metric": "somewhere/mine"}]}))
    with pytest.raises(ConfigError, match=r"the metric somewhere/mine of the package evaluate"):
        run_eval(eval_config, "--eval_tasks", str(task))


def test_templates_of_tasks_reach_no_objects_of_python(eval_config: Path, tmp_path: Path) -> None:
    hostile = {"doc_to_text": "{{ ''.__class__.__mro__ }}", "doc_to_target": "a"}
    folder = broken_task(tmp_path / "tasks", **one_document(tmp_path), **hostile)
    with pytest.raises(DataError, match="broken cannot be set up: SecurityError: access to attribute '__class__'"):
        run_eval(eval_config, "--include_path", str(folder), "--eval_tasks", "broken")


def test_no_such_include_path(eval_config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder with task YAMLs"):
        run_eval(eval_config, "--include_path", str(tmp_path / "none"), "--eval_tasks", "zen_choice")


def test_a_damaged_checkpoint(eval_config: Path, eval_checkpoint: Checkpoint, eval_tasks: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(eval_checkpoint.path, tmp_path / "global_step7")
    next(damaged.glob("layer_00*")).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is not whole"):
        run_eval(eval_config, f"load={damaged}", "--include_path", str(eval_tasks), "--eval_tasks", "zen_choice")


def test_all_checkpoints_can_be_read_before_the_first_is_scored(
    eval_config: Path, eval_checkpoint: Checkpoint, eval_tasks: Path, tmp_path: Path
) -> None:
    shutil.copytree(eval_checkpoint.path, tmp_path / "global_step7")
    (tmp_path / "global_step8").mkdir()
    flags = [f"load={tmp_path}", "--include_path", str(eval_tasks), "--eval_tasks", "zen_choice", "--iteration", "all"]
    with pytest.raises(CheckpointError, match="global_step8 cannot be read"):
        run_eval(eval_config, *flags)


def test_without_lm_eval(eval_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.registry.is_installed", lambda package: package != "lm_eval")
    with pytest.raises(EnvironmentSetupError, match=r"'lm_eval'.*pip install -e '\.\[eval\]'"):
        run_eval(eval_config, "--eval_tasks", "piqa")


def test_an_unreachable_hub_is_not_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    lm_eval_tasks.stay_offline_without_network()
    assert lm_eval_tasks.os.environ["HF_HUB_OFFLINE"] == "1"
