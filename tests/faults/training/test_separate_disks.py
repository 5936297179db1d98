"""Two machines without a common file system: what cannot work is refused before the first step, and the rest works.

Each rank has a working folder of its own, in which relative paths lead to its own disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.configs import TOKENFORMER
from tests.helpers.faults import this_rank
from tests.helpers.runs import Finished, run_ranks, train

RUN = TOKENFORMER | {"train_micro_batch_size_per_gpu": 2, "train_iters": 2, "eval_iters": 0}


def on_own_disk(disks: Path) -> None:
    from megatron.training import shared_folders

    shared_folders.SEEN_SECONDS = 1.0
    os.environ["LOCAL_RANK"] = "0"
    os.environ["XDG_CACHE_HOME"] = str(disks / f"disk{this_rank()}" / "cache")
    os.chdir(disks / f"disk{this_rank()}")


def run(config: Path, disks: Path, *overrides: str) -> Finished:
    for rank in range(2):
        (disks / f"disk{rank}").mkdir(exist_ok=True)
    finished = run_ranks(config, *overrides, ranks=2, before=on_own_disk, arguments=(disks,))
    assert "Traceback" not in finished.output, finished.output
    return finished


def test_save_is_refused(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(RUN)
    finished = run(config, tmp_path, f"log_dir={tmp_path}/log", "save=run")
    assert finished.codes == [1, 1]
    assert "/disk0/run of rank 0 (" in finished.output
    assert "is another folder than that of rank 1 (" in finished.output
    assert "step " not in finished.output
    assert not list((tmp_path / "disk0" / "run").iterdir())
    assert run(config, tmp_path, f"save={tmp_path}/shared").codes == [0, 0]


def test_data_and_indices_on_each_disk(write_config: Callable[..., Path], dataset: Path, tmp_path: Path) -> None:
    for disk in ("disk0", "disk1"):
        shutil.copytree(dataset.parent, tmp_path / disk / "data", ignore=shutil.ignore_patterns("*.npy", "*.lock"))
    config = write_config(RUN)
    overrides = [f"data_path=data/{dataset.name}", "index_cache_dir=null", "save=null", f"log_dir={tmp_path}/log"]
    assert run(config, tmp_path, *overrides).codes == [0, 0]
    assert all(list((tmp_path / disk / "data").rglob("*_sample_idx.npy")) for disk in ("disk0", "disk1"))
    tokens = tmp_path / "disk1" / "data" / f"{dataset.name}.bin"
    content = bytearray(tokens.read_bytes())
    content[7] ^= 1
    tokens.write_bytes(content)
    finished = run(config, tmp_path, *overrides)
    assert finished.codes == [1, 1]
    assert "has other data than rank 0" in finished.output and "data_path (.bin): rank 0" in finished.output
    assert "Copy the same files to every machine" in finished.output


@pytest.mark.full
def test_load_is_refused_or_fetched(write_config: Callable[..., Path], tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    train(write_config(RUN, "first"), f"save={tmp_path}/first", f"save_remote={store}")
    shutil.copytree(tmp_path / "first", tmp_path / "disk0" / "first")
    config = write_config(RUN, train_iters=4, finetune=True, log_dir=str(tmp_path / "log"))
    finished = run(config, tmp_path, "load=first")
    assert finished.codes == [1, 1]
    assert "first/global_step2 is on the machine of rank 0 (" in finished.output
    assert "and not on that of rank 1 (" in finished.output
    finished = run(config, tmp_path, f"load={store}")
    assert finished.codes == [0, 0], finished.output
    assert all(list((tmp_path / disk / "cache").rglob("global_step2")) for disk in ("disk0", "disk1"))
