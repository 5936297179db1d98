"""Tiers of tests by folder, and the datasets, configurations and checkpoints that all tiers read."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.helpers.configs import write_dataset

if TYPE_CHECKING:
    from megatron.checkpointing.store.checkpoint import Checkpoint
    from tests.helpers.layout_runs import LayoutRuns

TESTS = Path(__file__).parent
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    # Triton's own functions heed it when it is imported, as whatever a test imports may do.
    os.environ["TRITON_INTERPRET"] = "1"
UNIT_SECONDS = 120
"""Time that a unit test may take on a busy machine [s]."""


def pytest_configure() -> None:
    """Gives each worker of pytest-xdist a core of its own, and lets Ctrl-C reach what tests start.

    Ranks of one core hand over to each other as fast as those of two, at little more than half of the processor time.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell lets what it starts in the background ignore it, and so would everything that is started from there.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks each test with its tier, which is the folder in tests/ that it stands in, and with its worker's group."""
    for item in items:
        tier = item.path.relative_to(TESTS).parts[0]
        item.add_marker(tier)
        if tier == "unit" and not any(item.iter_markers("full")) and not any(item.iter_markers("timeout")):
            item.add_marker(pytest.mark.timeout(UNIT_SECONDS))
        if config.pluginmanager.hasplugin("xdist"):
            item.add_marker(pytest.mark.xdist_group(_group(item)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    """Ends where groups have no effect, as in pytest-xdist 3.8 with pytest 9.2: each worker would train every model."""
    if node.config.getvalue("dist") == "loadgroup" and not all("@" in name for name in ids):
        pytest.exit("this pytest does not take pytest-xdist's groups; install the pinned one (make test does)", 4)


def _group(item: pytest.Item) -> str:
    """Returns what the tests have in common that one worker is to run: the runs of one model, or else the file."""
    if not {"layout_runs", "half_copy"} & set(getattr(item, "fixturenames", ())):
        return str(item.path)
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    models = {getattr(parameter, "model", parameter) for parameter in parameters if not isinstance(parameter, dict)}
    return next(
        (f"layouts of {model}" for model in ("pythia", "gpt2", "llama") if model in models), "layouts of tokenformer"
    )


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a dataset whose bytes are predictable enough to learn from."""
    return write_dataset(tmp_path_factory.mktemp("dataset") / "text_document")


@pytest.fixture
def write_config(tmp_path: Path, dataset: Path) -> Callable[..., Path]:
    """Writes a YAML from a base and changes; data, checkpoints and index caches go to the test's folder."""

    def write(base: dict[str, Any], name: str = "tiny", **changes: Any) -> Path:
        folders = {"data_path": str(dataset), "save": str(tmp_path / name), "index_cache_dir": str(tmp_path / "index")}
        path = tmp_path / f"{name}.yml"
        path.write_text(yaml.safe_dump(base | folders | changes))
        return path

    return write


def _checkpoint_of(model: str, folder: Path) -> Checkpoint:
    from tests.helpers.tiny_checkpoints import MODELS, make_checkpoint, write_yaml

    return make_checkpoint(write_yaml(folder, MODELS[model]))


@pytest.fixture(scope="session")
def tokenformer(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A TokenFormer's checkpoint of one rank, float32; tests only read it."""
    return _checkpoint_of("l2_norm_gelu", tmp_path_factory.mktemp("tokenformer"))


@pytest.fixture(scope="session")
def pythia(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A Pythia's checkpoint of one rank, float32; tests only read it."""
    return _checkpoint_of("pythia", tmp_path_factory.mktemp("pythia"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A GPT-2's checkpoint of one rank, float32; tests only read it."""
    return _checkpoint_of("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A LLaMA's checkpoint of one rank, float32; tests only read it."""
    return _checkpoint_of("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def exported(tokenformer: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder exported from the TokenFormer's checkpoint."""
    from tests.helpers.tiny_checkpoints import export

    return export(tokenformer, tmp_path_factory.mktemp("exported") / "hf")


@pytest.fixture(scope="session")
def eval_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a tiny TokenFormer that reads 64 tokens, and whose tokens all have a text."""
    from tests.helpers.eval_models import write_eval_config

    return write_eval_config(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="session")
def eval_checkpoint(eval_config: Path) -> Checkpoint:
    """The checkpoint of one rank that belongs to `eval_config`."""
    from tests.helpers.tiny_checkpoints import make_checkpoint

    return make_checkpoint(eval_config)


@pytest.fixture(scope="session")
def eval_export(eval_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder exported from `eval_checkpoint`."""
    from tests.helpers.tiny_checkpoints import export

    return export(eval_checkpoint, tmp_path_factory.mktemp("eval_export") / "hf")


@pytest.fixture(scope="session")
def eval_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An include path with the tasks of tests/helpers/eval_tasks.py."""
    from tests.helpers.eval_tasks import write_tasks

    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def synchronous(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run on two ranks whose saves are waited for, and all kept, that of its initial weights too."""
    from tests.helpers.async_saves import write
    from tests.helpers.runs import train

    config = write(tmp_path_factory.mktemp("synchronous"), dataset, async_save=False, extra_save_iters=[0])
    train(config, ranks=2)
    return config.with_suffix("")


@pytest.fixture(scope="session")
def layout_runs(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> LayoutRuns:
    """Runs in all layouts, each trained when it is first asked for."""
    from tests.helpers.layout_runs import LayoutRuns

    return LayoutRuns(tmp_path_factory.mktemp("layouts"), dataset)


@pytest.fixture
def half_copy(layout_runs: LayoutRuns, tmp_path: Path) -> Path:
    """A checkpoint after half of the steps of a run on two ranks, to be changed; without a conversion."""
    from tests.helpers.layout_runs import HALF, SPLIT

    source = layout_runs.trained(SPLIT).checkpoint(HALF)
    shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("universal*"))
    return tmp_path / source.name
