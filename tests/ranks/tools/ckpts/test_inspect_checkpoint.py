"""What is shown of a checkpoint, against the model and the files that it was made from."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron.checkpointing.store.manifest import FileEntry, describe_file, read_manifest, write_manifest
from megatron.errors import CheckpointError
from tests.helpers.configs import TOKENFORMER, write_dataset
from tests.helpers.runs import train
from tools.ckpts import inspect_checkpoint

Inspect = Callable[..., tuple[int, Any]]


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Inspect:
    """`inspect_checkpoint.py ARGUMENTS --json`: its exit code, and what it printed."""

    def run(*arguments: object) -> tuple[int, Any]:
        code = inspect_checkpoint.main([*map(str, arguments), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run of two data-parallel ranks that saved after its steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    paths = {"data_path": str(write_dataset(folder / "text_document")), "save": str(folder / "run")}
    config = folder / "run.yml"
    config.write_text(yaml.safe_dump(TOKENFORMER | paths | {"train_iters": 4, "checkpoint_factor": 2}))
    train(config, "precision=bfloat16", ranks=2)
    return config


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The folder of that run, to be spoiled."""
    return Path(shutil.copytree(trained.with_suffix(""), tmp_path / "run"))


def test_optimizer_norms_are_those_of_the_optimizers_files(trained: Path, inspect: Inspect) -> None:
    """Over all parameters together: there, they lie one after the other, cut in two and padded with zeros."""
    path = trained.with_suffix("") / "global_step4"
    code, report = inspect(path, "--optimizer")
    assert code == 0
    expected = dict.fromkeys(("fp32", "exp_avg", "exp_avg_sq"), 0.0)
    for rank in range(2):
        # A file of the test's own making; it holds DeepSpeed's LossScaler.
        file = torch.load(path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", weights_only=False)
        content = file["optimizer_state_dict"]
        flats = [{"fp32": flat} for flat in content["single_partition_of_fp32_groups"]]
        for state in [*flats, *content["base_optimizer_state"]["state"].values()]:
            for key in expected.keys() & state.keys():
                expected[key] += float((state[key].detach().double() ** 2).sum())
    for key, sum_of_squares in expected.items():
        assert sum_of_squares > 0
        total = sum(tensor["optimizer_norms"][key] ** 2 for tensor in report["tensors"])
        assert total == pytest.approx(sum_of_squares, rel=1e-9)
    assert {tensor["dtype"] for tensor in report["tensors"]} == {"bfloat16"}


def test_a_folder_stands_for_its_newest_checkpoint(copied: Path, inspect: Inspect) -> None:
    code, report = inspect(copied, "--no-tensors")
    assert (code, report["state"]["iteration"]) == (0, 4)
    assert report["others"] == [{"name": "global_step2", "problems": []}]
    assert "tensors" not in report
    code, report = inspect(copied, "--iteration", 2, "--no-tensors")
    assert (code, report["state"]["iteration"], report["others"]) == (0, 2, [])


def test_differences_to_a_configuration(trained: Path, inspect: Inspect) -> None:
    # The run itself had an override, which its YAML does not say.
    arguments = [trained.with_suffix(""), "--no-tensors", "--config", trained, "weight_decay=0.25", "num_workers=1"]
    _, report = inspect(*arguments)
    found = {each["key"]: (each["checkpoint"], each["given"]) for each in report["differences"]}
    assert found == {"precision": ("bf16", "fp32"), "weight_decay": (0.1, 0.25), "num_workers": (0, 1)}


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-1]) and None, "bytes instead of"),
    "deleted": (lambda file: file.unlink(), "is missing"),
    "flipped": (flip_byte, "is damaged: its SHA-256 differs"),
    "planted": (lambda file: (file.parent / "layer_99.pt").touch(), "layer_99.pt is not in its manifest"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("level", ["full", "sizes"])
def test_damage_is_named_and_ends_with_1(kind: str, level: str, copied: Path, inspect: Inspect) -> None:
    inflict, message = DAMAGE[kind]
    inflict(copied / "global_step4" / "layer_01-model_00-model_states.pt")
    code, report = inspect(copied / "global_step4", "--verify", level)
    if (kind, level) == ("flipped", "sizes"):
        assert (code, report["problems"]) == (0, [])
    else:
        assert code == 1
        assert len(report["problems"]) == 1 and message in report["problems"][0]


def test_damage_to_another_checkpoint_of_the_folder(copied: Path, inspect: Inspect) -> None:
    (copied / "global_step4" / "manifest.json").unlink()
    code, report = inspect(copied, "--no-tensors")
    assert (code, report["state"]["iteration"]) == (1, 2)
    assert "global_step4: it has no manifest.json" in report["others"][0]["problems"][0]
    (copied / "global_step2" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint that can be read\.\n  global_step2: (.|\n)*step4"):
        inspect(copied)
    with pytest.raises(CheckpointError, match=r"global_step4 cannot be read: it has no manifest\.json"):
        inspect(copied, "--iteration", 4)


def test_a_weight_that_is_not_finite(copied: Path, inspect: Inspect, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "global_step4"
    file = path / "layer_01-model_00-model_states.pt"
    weights = torch.load(file, weights_only=True)
    weights["mlp.key_tokens"][0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    torch.save(weights, file)
    manifest = read_manifest(path)
    files: dict[str, FileEntry] = manifest.files | {file.name: describe_file(file)}
    write_manifest(path, type(manifest)(**(vars(manifest) | {"files": files})))
    _, report = inspect(path)
    [found] = [tensor for tensor in report["tensors"] if tensor["not_finite"]]
    assert (found["name"], found["not_finite"], found["norm"]) == ("layers.0.mlp.key_tokens", 3, None)
    assert inspect_checkpoint.main([str(path)]) == 0
    assert "3 NOT FINITE" in capsys.readouterr().out


def test_the_text_says_what_the_json_says(trained: Path, inspect: Inspect, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(trained.with_suffix("")), "--optimizer", "--config", str(trained)]
    _, report = inspect(*arguments)
    assert inspect_checkpoint.main(arguments) == 0
    text = capsys.readouterr().out
    assert "  step            4\n" in text and "  layout          tensor 1, pipe 1, data 2\n" in text
    assert "  verified        full: whole\n" in text and "  global_step2            whole\n" in text
    assert "  precision: checkpoint bf16, given fp32\n" in text
    for tensor in report["tensors"]:
        [line] = [line for line in text.splitlines() if line.startswith(f"{tensor['name']} ")]
        numbers = [tensor["norm"], tensor["largest"], *tensor["optimizer_norms"].values()]
        assert line.split()[-5:] == [f"{number:.6g}" for number in numbers]
