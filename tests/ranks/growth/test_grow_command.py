"""The command that grows a checkpoint, and the runs before and after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.errors import CheckpointError, ConfigError
from tests.helpers.configs import PYTHIA, TOKENFORMER, layout_keys, write_dataset
from tests.helpers.runs import run_ranks
from tools.ckpts import grow

STEPS = 4
SMALL = TOKENFORMER | {"train_iters": 2 * STEPS, "eval_iters": 1, "eval_interval": STEPS}
TOKENS = {"qkv_slot_num": 32, "ffn_slot_num": 64}
LARGE = SMALL | TOKENS | {"qkv_scale_base": 24, "ffn_scale_base": 48}


class Folder:
    """A trained small model, and configurations for what comes after it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = {"data_path": str(write_dataset(path / "text")), "index_cache_dir": str(path / "index")}
        assert run_ranks(self.config("small", SMALL, 2, 1), f"exit_interval={STEPS}", ranks=2).code == 75

    def config(self, name: str, keys: dict[str, Any], tensor: int, pipe: int) -> Path:
        path = self.path / f"{name}.yml"
        layout = layout_keys(tensor, pipe) | {"eval_iters": 1}
        path.write_text(yaml.safe_dump(keys | layout | self.data | {"save": str(self.path / name)}))
        return path

    def grow(self, name: str, keys: dict[str, Any], *words: str) -> int:
        config = self.config(name, keys, 1, 2)
        folders = ["--input_dir", str(self.path / "small"), "--output_dir", str(self.path / name)]
        return grow.main([*folders, "--config_file", str(config), *words])

    def losses(self, name: str, key: str) -> dict[int, float]:
        rows = [json.loads(line) for line in (self.path / name / "metrics.jsonl").read_text().splitlines()]
        return {row["iteration"]: row[key] for row in rows if key in row}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("grow"))


def test_a_grown_run_goes_on_as_if_nothing_had_happened(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """In another layout, from the next step on: the first loss after growth is the small model's."""
    assert folder.grow("grown", LARGE, "seed=3") == 0
    sizes = [512 * 32 + 2 * 2 * 32 * tokens + 2 * 32 for tokens in (3 * 24 + 40 + 48, 3 * 32 + 40 + 64)]
    assert f"grown by zero_key from {sizes[0]:,} to {sizes[1]:,} parameters" in capsys.readouterr().out
    assert run_ranks(folder.config("grown", LARGE, 1, 2), "auto_resume=true", ranks=2).code == 0
    small = folder.config("ungrown", SMALL, 1, 1)
    assert run_ranks(small, f"load={folder.path / 'small'}").code == 0
    grown, ungrown = (folder.losses(name, "train/lm_loss") for name in ("grown", "ungrown"))
    assert sorted(grown) == sorted(ungrown) == list(range(STEPS + 1, 2 * STEPS + 1))
    assert grown[STEPS + 1] == pytest.approx(ungrown[STEPS + 1], abs=1e-6)
    assert grown[2 * STEPS] != ungrown[2 * STEPS], "new keys learn"


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (LARGE | {"ffn_slot_num": 40, "ffn_scale_base": 48}, ConfigError, "ffn_slot_num: 40 is fewer"),
        (SMALL | TOKENS, ConfigError, "Set `qkv_scale_base: 24`"),
        (LARGE | {"num_layers": 3}, ConfigError, "num_layers: checkpoint 2, configuration 3"),
        (LARGE | {"hidden_size": 64}, ConfigError, "hidden_size: checkpoint 32, configuration 64"),
        (PYTHIA, ConfigError, "architecture: checkpoint tokenformer, configuration gpt_neox"),
    ],
)
def test_what_cannot_grow_is_refused_and_nothing_written(
    keys: dict[str, Any], error: type[Exception], message: str, folder: Folder
) -> None:
    with pytest.raises(error, match=message):
        folder.grow("refused", keys)
    assert not (folder.path / "refused").exists()


def test_a_checkpoint_is_not_grown_into_its_own_folder(folder: Folder) -> None:
    config = folder.config("small", LARGE, 1, 1)
    with pytest.raises(CheckpointError, match="Name another folder"):
        grow.main([
            "--input_dir", str(folder.path / "small"), "--output_dir", str(folder.path / "small"),
            "--config_file", str(config),
        ])  # fmt: skip
