"""A small set of lm-eval tasks over local files, of text that every Python carries: the Zen of Python, docstrings.

zen_choice     multiple choice: which ending belongs to the beginning of an aphorism? few-shot examples from `train`
zen_last_word  the last word of an aphorism, as LAMBADA asks it
docs_text      word, byte and bit measures over docstrings, longer than a small model's context
zen_continue   the rest of an aphorism, generated up to its end
"""

from __future__ import annotations

import codecs
import contextlib
import inspect
import io
import json
import textwrap
from pathlib import Path
from typing import Any

import yaml

TASKS = ("zen_choice", "zen_last_word", "docs_text", "zen_continue")
FEWSHOT_EXAMPLES = 5
DOCUMENTED = (json.loads, textwrap.dedent, inspect.getdoc, codecs.open)


def write_tasks(folder: Path) -> Path:
    """Write the tasks' YAMLs and data to `folder`, which is to be an include path; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = _aphorisms()
    halves = [(line[: len(line) // 2], line[len(line) // 2 :]) for line in lines]
    choices = [
        {
            "beginning": beginning,
            "endings": [halves[(index + shift) % len(halves)][1] for shift in (3, 0, 7, 5)],
            "answer": 1,
        }
        for index, (beginning, _) in enumerate(halves)
    ]
    words = [dict(zip(("context", "word"), line.rstrip(".!").rsplit(" ", 1), strict=True)) for line in lines]
    texts = [{"text": inspect.getdoc(documented) or ""} for documented in DOCUMENTED]
    rest = [{"beginning": beginning, "ending": ending} for beginning, ending in halves]
    _write_task(
        folder,
        "zen_choice",
        {"train": choices[:FEWSHOT_EXAMPLES], "test": choices[FEWSHOT_EXAMPLES:]},
        output_type="multiple_choice",
        training_split="train",
        fewshot_split="train",
        doc_to_text="{{beginning}}",
        doc_to_target="{{answer}}",
        doc_to_choice="{{endings}}",
        target_delimiter="",
        metric_list=[_mean("acc"), _mean("acc_norm")],
    )
    _write_task(
        folder,
        "zen_last_word",
        {"test": words},
        output_type="loglikelihood",
        doc_to_text="{{context}}",
        doc_to_target="{{' ' + word}}",
        target_delimiter="",
        metric_list=[{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}, _mean("acc")],
    )
    _write_task(
        folder,
        "docs_text",
        {"test": texts},
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
    )
    _write_task(
        folder,
        "zen_continue",
        {"test": rest},
        output_type="generate_until",
        doc_to_text="{{beginning}}",
        doc_to_target="{{ending}}",
        generation_kwargs={"until": [".", "e"], "max_gen_toks": 12, "do_sample": False},
        metric_list=[_mean("exact_match")],
    )
    return folder


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _write_task(folder: Path, name: str, splits: dict[str, list[dict[str, Any]]], **settings: Any) -> None:
    files = {}
    for split, documents in splits.items():
        path = folder / f"{name}_{split}.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
        files[split] = str(path)
    data = {"data_files": files, "cache_dir": str(folder / "cache")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **settings}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | {"metadata": {"version": 1.0}}))


def _aphorisms() -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13").splitlines()[2:]
