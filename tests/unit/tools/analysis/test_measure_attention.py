"""tools/analysis/measure_attention.py as users run it: on runs, checkpoints of any layout, and Hugging Face folders."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.errors import CheckpointError, ConfigError, DataError
from tests.helpers.configs import PYTHIA
from tests.helpers.tiny_checkpoints import make_checkpoint, write_yaml
from tools.analysis.measure_attention import main

STATISTICS = ("rank", "column_mass", "entropy", "sink_mass")
SIZES = ["--sequences", "6", "--length", "16"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("All happy families are alike; every unhappy family is unhappy in its own way. " * 3)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with checkpoints of two steps, the second of two tensor-parallel ranks and two stages."""
    folder = tmp_path_factory.mktemp("run")
    first = make_checkpoint(write_yaml(folder, PYTHIA), iteration=3).path
    other = make_checkpoint(write_yaml(tmp_path_factory.mktemp("split"), PYTHIA), tensor=2, pipe=2, iteration=7).path
    shutil.copytree(other, first.parent / other.name)
    return first.parent


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(row: dict[str, str]) -> list[float]:
    return [float(row[name]) for name in STATISTICS]


def test_a_run_over_its_checkpoints(run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--iteration", "all", "--text", str(text), "--output", str(tmp_path / "out"), *SIZES]) == 0
    shown = capsys.readouterr()
    assert f"{run}, step 3\n" in shown.out and f"{run}, step 7\n" in shown.out
    assert "nulls at 16 tokens, tau 0.9" in shown.out and "of 2 layers are of rank 1" in shown.out
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"heads.csv", "layers.csv", "layers.png", "heads-run.png", "training-run.png"}
    assert all(str(tmp_path / "out" / name) in shown.out for name in written)
    heads, layers = (rows(tmp_path / "out" / f"{name}.csv") for name in ("heads", "layers"))
    assert [(row["iteration"], row["layer"], row["head"]) for row in heads] == [
        (step, str(layer), str(head)) for step in ("3", "7") for layer in (1, 2) for head in (1, 2, 3, 4)
    ]
    # The same weights in another layout.
    assert [numbers(row) for row in heads[:8]] == [numbers(row) for row in heads[8:]]
    of_layer = [numbers(row) for row in heads[:4]]
    assert numbers(layers[0]) == pytest.approx(
        [max(row[0] for row in of_layer), *(sum(row[column] for row in of_layer) / 4 for column in (1, 2, 3))]
    )
    assert [row["model"] for row in layers[4:]] == ["null: uniform causal", "null: pure sink"]
    assert numbers(layers[5]) == [1, 1, 0, 1]


def test_an_export_agrees_with_its_checkpoint(
    exported: Path, tokenformer: Checkpoint, dataset: Path, tmp_path: Path
) -> None:
    main([str(exported), str(tokenformer.path), "--data_path", str(dataset), "--output", str(tmp_path), *SIZES])
    found = rows(tmp_path / "heads.csv")
    theirs, ours = ([numbers(row) for row in found if (row["model"] == str(exported)) == is_export]
                    for is_export in (True, False))  # fmt: skip
    assert len(theirs) == len(ours) == 2 * 4
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), rtol=1e-5, atol=1e-5)


def test_a_model_of_an_architecture_that_is_unknown_here(exported: Path, text: Path, tmp_path: Path) -> None:
    folder = foreign_model(exported, tmp_path / "opt")
    main([str(folder), "--text", str(text), "--output", str(tmp_path / "out"), *SIZES])
    found = [numbers(row) for row in rows(tmp_path / "out" / "heads.csv")]
    assert len(found) == 3 * 4
    assert all(1 <= rank <= 16 and 1 <= columns <= 16 and 0 < sink < 1 for rank, columns, _, sink in found)


def foreign_model(tokenizer: Path, folder: Path) -> Path:
    """A tiny OPT with random weights, and the tokenizer of another folder."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(1)
    config = OPTConfig(vocab_size=512, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=3,
                       num_attention_heads=4, max_position_embeddings=16)  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    return folder


def test_a_model_whose_numbers_are_not_finite(exported: Path, text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(exported, tmp_path / "hf"))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.1" in name)
    weights[name][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{folder}: the attention probabilities of layer 2 are not finite"):
        main([str(folder), "--text", str(text), "--output", str(tmp_path / "out"), *SIZES])


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["/nowhere"], CheckpointError, "/nowhere: no such folder"),
        (["{tmp}"], CheckpointError, "holds neither checkpoints"),
        (["{run}", "--iteration", "5"], CheckpointError, "Iterations there: 3, 7"),
        (["{exported}", "--iteration", "5"], ConfigError, "which has no steps"),
        (["{run}", "--length", "17"], DataError, "knows 16 positions, and the sequences have 17 tokens"),
        (["{exported}", "--length", "17"], DataError, "knows 16 positions, and the sequences have 17 tokens"),
        (["{run}", "--sequences", "1000"], DataError, "Give more text, or --sequences "),
        (["{run}", "--text", "/nowhere.txt"], DataError, "--text: /nowhere.txt cannot be read"),
        (["{bert}"], CheckpointError, "its model cannot be loaded: "),
    ],
)
def test_what_cannot_be_measured(
    words: list[str], error: type[Exception], message: str, run: Path, exported: Path, text: Path, tmp_path: Path
) -> None:
    bert = tmp_path / "bert"
    shutil.copytree(exported, bert)
    (bert / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    places: dict[str, Any] = {"run": run, "exported": exported, "bert": bert, "tmp": tmp_path}
    given = [word.format(**places) for word in words]
    defaults = [*SIZES, *([] if "--text" in given else ["--text", str(text)]), "--output", str(tmp_path / "out")]
    with pytest.raises(error, match=message):
        main([given[0], *defaults, *given[1:]])
    assert not (tmp_path / "out").exists()
