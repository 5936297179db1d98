"""Asks before YAMLs of tasks run code: lm-eval imports the Python that they name as soon as it reads them.

Code is what a tag such as `!function` imports, and a metric that `evaluate` loads. Templates are programs too; those
run in jinja2's sandbox, which keeps them from Python's own objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from jinja2.sandbox import SandboxedEnvironment

from megatron.config.sections.evaluation import EvaluationConfig
from megatron.errors import ConfigError

_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp")
}


def require_consent(config: EvaluationConfig) -> None:
    """Raises ConfigError for task YAMLs of the user's that run code, unless the configuration trusts it.

    Looks at all YAMLs of the include path, at those that are tasks by their path, and at those that they include.
    """
    own = [Path(name) for name in config.tasks if Path(name).suffix == ".yaml" and Path(name).is_file()]
    if config.include_path is not None:
        own += sorted(Path(config.include_path).rglob("*.yaml"))
    if not own or config.trust_remote_code:
        return
    for file in _with_includes(own):
        for line, code in _code_in(file):
            raise ConfigError(
                f"{file}:{line}: this task runs Python: {code}. Read what that does, and set "
                "`eval_trust_remote_code: true` to let it run."
            )
    _sandbox_templates()


def _with_includes(files: Sequence[Path]) -> Iterator[Path]:
    pending, seen = list(files), set()
    while pending:
        file = pending.pop(0)
        if file.resolve() in seen or not file.is_file():
            continue
        seen.add(file.resolve())
        yield file
        root = _compose(file)
        for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
            if key.value == "include":
                names = value.value if isinstance(value, yaml.SequenceNode) else [value]
                pending += [file.parent / str(name.value) for name in names]


def _compose(file: Path) -> yaml.Node | None:
    try:
        with file.open("rb") as stream:
            node: yaml.Node | None = yaml.compose(stream, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as the YAML of a task: {error}") from error
    return node


def _code_in(file: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, what is run) for everything in a YAML that runs code."""
    pending, seen = [_compose(file)], set()
    while pending:
        node = pending.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        line = node.start_mark.line + 1
        if node.tag not in _PLAIN_TAGS:
            yield line, f"{node.tag} {node.value}" if isinstance(node, yaml.ScalarNode) else node.tag
        if isinstance(node, yaml.SequenceNode):
            pending += node.value
        elif isinstance(node, yaml.MappingNode):
            entries = {key.value: value.value for key, value in node.value if isinstance(key, yaml.ScalarNode)}
            metric = entries.get("metric")
            if str(entries.get("hf_evaluate")).lower() == "true" or (isinstance(metric, str) and not _is_own(metric)):
                yield line, f"the metric {metric} of the package evaluate"
            pending += [part for entry in node.value for part in entry]


def _is_own(metric: str) -> bool:
    """Tells whether lm-eval has a metric itself: it has `evaluate` load any other, from a folder or from the hub."""
    from lm_eval.api import metrics, registry

    # The registry is filled by the import of the metrics.
    return metrics is not None and metric in registry.METRIC_REGISTRY


def _sandbox_templates() -> None:
    """Replaces the environment of lm-eval's templates by a sandbox with the same settings."""
    from lm_eval import utils

    if not isinstance(utils.env, SandboxedEnvironment):
        sandbox = SandboxedEnvironment(
            loader=utils.env.loader,
            undefined=utils.env.undefined,
            keep_trailing_newline=utils.env.keep_trailing_newline,
        )
        sandbox.filters = utils.env.filters
        utils.env = sandbox
