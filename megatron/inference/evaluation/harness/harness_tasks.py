"""Loads tasks of lm-eval by name, and reports whatever is wrong with them before a model is loaded.

Needs lm-eval (the extra `eval`).
"""

from __future__ import annotations

import difflib
import os
import random
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError

from megatron.config.sections.evaluation import EvaluationConfig
from megatron.errors import ConfigError, DataError
from megatron.inference.evaluation.harness.task_consent import require_consent

SEEDS = {"random_seed": 0, "numpy_seed": 1234, "torch_seed": 1234, "fewshot_seed": 1234}
"""lm-eval's own defaults, so that its command line and ours choose the same examples."""
HUB_SECONDS = 5.0
"""Time that the hub has to answer [s]."""


class HarnessTasks:
    """Tasks of lm-eval that are ready to run."""

    def __init__(self, content: dict[Any, Any]) -> None:
        self.content = content
        """The argument of lm-eval's `evaluate`."""

    @property
    def tasks(self) -> dict[str, Any]:
        """Returns the single tasks by name, without their groups."""
        return dict(_leaves(self.content.get("tasks", self.content)))

    def set_seeds(self) -> None:
        """Sets every seed that the choice of examples depends on; must come before each run."""
        random.seed(SEEDS["random_seed"])
        np.random.seed(SEEDS["numpy_seed"])
        torch.manual_seed(SEEDS["torch_seed"])
        for task in self.tasks.values():
            task.set_fewshot_seed(seed=SEEDS["fewshot_seed"])


def load_tasks(config: EvaluationConfig) -> HarnessTasks:
    """Loads the configured tasks with their data.

    Raises ConfigError for an unknown task, for one that is given twice, and for one that runs code without consent;
    DataError for data that cannot be had and
    for fewer solved examples than asked for.
    """
    if config.include_path is not None and not Path(config.include_path).is_dir():
        raise ConfigError(f"eval_include_path: {config.include_path} is not a folder with task YAMLs.")
    require_consent(config)
    manager = _task_manager(config)
    names = _known_names(config.tasks, manager)
    content: dict[Any, Any] = {}
    owners: dict[str, str] = {}
    for name in names:
        loaded = _load(name, manager)
        for task in HarnessTasks(loaded).tasks:
            if task in owners:
                raise ConfigError(f"eval_tasks: {owners[task]} and {name} both ask for {task}. Leave one out.")
            owners[task] = name
        _merge(content, loaded)
    tasks = HarnessTasks(content)
    for name, task in tasks.tasks.items():
        _set_fewshot(name, task, config.num_fewshot)
    return tasks


def _task_manager(config: EvaluationConfig) -> Any:
    """Builds lm-eval's index of tasks.

    Its own ten thousand YAMLs take seconds to index. They are left out where only single tasks of the include path are
    asked for.
    """
    from lm_eval.tasks import TaskManager

    if config.include_path is not None:
        manager = TaskManager(include_path=config.include_path, include_defaults=False)
        if set(config.tasks) <= set(manager.all_subtasks):
            return manager
    return TaskManager(include_path=config.include_path)


def stay_offline_without_network() -> None:
    """Keeps Hugging Face's libraries from asking a hub that does not answer, again and again, for what is not cached.

    Must come before their first import, since they read their environment once.
    """
    if os.environ.get("HF_HUB_OFFLINE"):
        return
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(hub, method="HEAD")  # noqa: S310 - the user's own setting
        urllib.request.urlopen(request, timeout=HUB_SECONDS).close()  # noqa: S310
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError):
        os.environ["HF_HUB_OFFLINE"] = "1"


def _known_names(wanted: list[str], manager: Any) -> list[str]:
    """Expands patterns such as `mmlu_*`; returns each name once, and paths of YAMLs as they are."""
    names: list[str] = []
    unknown = []
    for name in wanted:
        matches = manager.match_tasks([name]) or (
            [name] if Path(name).suffix == ".yaml" and Path(name).is_file() else []
        )
        names += matches
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            unknown.append(f"{name!r}" + (f" (near: {', '.join(near)})" if near else ""))
    if unknown:
        raise ConfigError(
            f"eval_tasks: there is no task {', '.join(unknown)}. `lm-eval ls tasks` lists lm-eval's; YAMLs of your own "
            "are found in the folder that `--include_path` names."
        )
    return list(dict.fromkeys(names))


def _load(name: str, manager: Any) -> dict[Any, Any]:
    try:
        if hasattr(manager, "load"):
            found: dict[Any, Any] = manager.load([name])
            return found
        # lm-eval before 0.4.12
        from lm_eval.tasks import get_task_dict
        from lm_eval.utils import load_yaml_config

        return dict(get_task_dict([load_yaml_config(name) if name.endswith(".yaml") else name], manager))
    except OSError as error:
        offline = (
            " The Hugging Face hub is not asked, for it does not answer." if os.environ.get("HF_HUB_OFFLINE") else ""
        )
        raise DataError(
            f"eval_tasks: the data of {name} cannot be had: {error}.{offline} Load the task once where there is a "
            "network and take HF_HOME along, or give a task whose YAML names local files (`--include_path`)."
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError, ImportError, TemplateError) as error:
        raise DataError(
            f"eval_tasks: {name} cannot be set up: {type(error).__name__}: {error}. See its YAML."
        ) from error


def _merge(content: dict[Any, Any], loaded: dict[Any, Any]) -> None:
    if "tasks" not in loaded:
        content.update(loaded)
        return
    for part, entries in loaded.items():
        content.setdefault(part, {}).update(entries)


def _leaves(nested: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, entry in nested.items():
        if isinstance(entry, dict):
            yield from _leaves(entry)
        else:
            yield name, entry


def _set_fewshot(name: str, task: Any, asked: int | None) -> None:
    """Sets the number of solved examples as lm-eval does: `asked` replaces the task's own, unless that is a fixed 0.

    None means 0. Raises DataError when the task has fewer examples.
    """
    own = task.get_config("num_fewshot")
    count = own if asked is None or own == 0 else asked
    task.set_config(key="num_fewshot", value=count or 0)
    if not count:
        return
    docs = task.fewshot_docs()
    there = 0 if docs is None else len(list(docs))
    # An example that is the question itself is taken out of one more.
    needed = count + (task.config.fewshot_split == task.config.test_split)
    if there < needed:
        raise DataError(
            f"eval_num_fewshot: {name} has {there} solved examples, and {needed} are needed to show {count} beside "
            "each question. Lower it."
        )
