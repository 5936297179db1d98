"""The smallest shipped recipe of each architecture takes two steps on a CPU, cut down to a size that fits one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.records import records
from tests.helpers.runs import ROOT, train

SMALL = [
    "train_batch_size=2",
    "train_micro_batch_size_per_gpu=1",
    "seq_length=32",
    "train_iters=2",
    "num_layers=2",
    "hidden_size=192",
    "log_interval=1",
    "eval_iters=0",
    "num_workers=0",
    "fp16.enabled=false",
    "tokenizer_type=CharLevelTokenizer",
]


@pytest.mark.parametrize(
    ("recipe", "layer"),
    [
        ("tokenformer/150M", "tokenformer"),
        ("pythia/14M", "flash"),
        pytest.param("gpt2/small", "flash", marks=pytest.mark.full),
        pytest.param("llama/1-5B", "flash", marks=pytest.mark.full),
        pytest.param("inheritune/gpt2_medium_16", "global", marks=pytest.mark.full),
    ],
)
def test_two_steps(recipe: str, layer: str, dataset: Path, tmp_path: Path) -> None:
    folders = [f"data_path={dataset}", f"log_dir={tmp_path}", f"index_cache_dir={tmp_path}"]
    train(ROOT / "configs" / f"{recipe}.yml", *SMALL, f'attention_config=[[["{layer}"], 2]]', *folders, output=tmp_path)
    losses = records(tmp_path, "train/lm_loss")
    # Untrained models over 50,304 tokens, or LLaMA's 32,000: near ln 50304 = 10.83, ln 32000 = 10.37.
    assert list(losses) == [1, 2]
    assert all(10.0 < loss < 12.0 for loss in losses.values())
