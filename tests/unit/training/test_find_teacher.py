"""A teacher is looked at by --check: it must be there, whole, of the run's tokenizer, and fit the run's layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deepy
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.load_config import load_config
from megatron.errors import CheckpointError, ConfigError
from megatron.model.speedups import choose_speedups
from megatron.mpu.context import ParallelContext
from megatron.training.check_config import require_trainable
from megatron.training.distillation.find_teacher import find_teacher
from megatron.training.distillation.teacher_stage import TeacherStage
from tests.helpers.configs import PYTHIA, TOKENFORMER
from tests.helpers.tiny_checkpoints import MODELS, make_checkpoint, tokens, whole_model, write_yaml


def check(config: Path, *overrides: str) -> list[str]:
    return require_trainable(load_config([config], overrides))


def write(write_config: Callable[..., Path], teacher: Path, base: dict[str, Any] = TOKENFORMER, **changes: Any) -> Path:
    return write_config(base, distillation={"teacher": str(teacher)} | changes)


@pytest.fixture
def copied(pythia: Checkpoint, tmp_path: Path) -> Path:
    """A copy of a checkpoint of step 7 in a run's folder, for tests that damage it."""
    return Path(shutil.copytree(pythia.path, tmp_path / "teacher" / pythia.path.name))


def test_check_shows_the_teacher(
    pythia: Checkpoint, write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(write_config, pythia.path)
    assert deepy.main(["train.py", str(config), "--check"]) == 0
    shown = capsys.readouterr().out
    assert "the configuration is valid" in shown
    assert f"distilled from {pythia.path}: gpt_neox, 2 layers of 32, " in shown
    # Layers with biases and norms, the final norm, and an untied vocabulary of the run's 512 rows.
    (line,) = check(config, "model_parallel_size=2", "precision=bfloat16")
    count = 2 * (12 * 32**2 + 9 * 32 + 4 * 32) + 2 * 32 + 2 * 512 * 32
    assert (
        f" {count:,} parameters; {count * 2 / 2 / 2**30:.3g} GiB in bf16 on each rank, without optimizer state" in line
    )


def test_a_missing_teacher_is_a_missing_key(write_config: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"missing key distillation\.teacher: expected .*; must be given wherever"):
        load_config([write_config(TOKENFORMER, distillation={"weight": 0.5})])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 0}, r"distillation\.weight: 0: expected a number above 0"),
        ({"weight": 1.5}, r"distillation\.weight: 1\.5: expected .*at most 1"),
        ({"temperature": 0.0}, r"distillation\.temperature: 0\.0: expected"),
        ({"divergence": "kl"}, r"distillation\.divergence: kl: expected .*forward_kl.*reverse_kl.*jensen_shannon"),
        ({"teacher": "s3://bucket/run"}, r"distillation\.teacher: .*expected a path on this machine"),
        ({"alpha": 0.6}, r"distillation\.alpha"),
    ],
)
def test_a_wrong_value(changes: dict[str, Any], message: str, write_config: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([write_config(TOKENFORMER, distillation={"teacher": "runs/teacher"} | changes)])


def refusal(config: Path, *overrides: str) -> str:
    """Returns what the check says, which names the line of the teacher."""
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        check(config, *overrides)
    number = 1 + next(n for n, text in enumerate(config.read_text().splitlines()) if text.startswith("  teacher:"))
    assert str(caught.value).startswith(f"{config}:{number} distillation.teacher: ")
    return str(caught.value)


def test_a_teacher_that_is_not_there_or_not_whole(
    copied: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    assert "no such folder" in refusal(write(write_config, tmp_path / "nowhere"))
    assert "neither a finished checkpoint" in refusal(write(write_config, tmp_path))
    config = write(write_config, copied.parent)
    assert len(check(config)) == 1
    assert "Iterations there: 7" in refusal(write(write_config, copied.parent, iteration=8))
    config = write(write_config, copied)
    weights = next(copied.glob("layer_*.pt"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert f"{weights.name} has " in refusal(config)
    (copied / "manifest.json").unlink()
    assert "it has no manifest.json: not a whole checkpoint" in refusal(config)
    assert "it has no manifest.json" in refusal(write(write_config, copied.parent))


def test_a_teacher_of_another_vocabulary_or_tokenizer(
    copied: Path, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write(write_config, copied)
    change_state(copied, vocab_size=510)
    assert "has a vocabulary of 510 tokens, and this run one of 512" in refusal(config)
    change_state(copied, vocab_size=512, data_fingerprint={"tokenizer_type": "HFTokenizer", "vocab_file": "sha256 1"})
    assert "another tokenizer (tokenizer_type, vocab_file differ)" in refusal(config)
    change_state(copied, data_fingerprint={"tokenizer_type": "CharLevelTokenizer", "seq_length": "99"})
    (line,) = check(config)
    assert "could be compared" not in line


def change_state(checkpoint: Path, **values: Any) -> None:
    """Changes state.json, and what the manifest says of it."""
    from megatron.checkpointing.store.manifest import describe_file, read_manifest, write_manifest

    manifest = read_manifest(checkpoint)
    state = json.loads((checkpoint / "state.json").read_text()) | values
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest.files["state.json"] = describe_file(checkpoint / "state.json")
    write_manifest(checkpoint, manifest)


def test_a_teacher_that_does_not_fit_the_layout(pythia: Checkpoint, write_config: Callable[..., Path]) -> None:
    config = write(write_config, pythia.path, TOKENFORMER | {"num_layers": 4})
    message = refusal(config, "pipe_parallel_size=3")
    assert "does not fit this run's layout" in message and "is above num_layers 2" in message
    longer = write(write_config, pythia.path, TOKENFORMER | {"seq_length": 32, "max_position_embeddings": 32})
    assert "knows 16 positions (max_position_embeddings), and this run has seq_length 32" in refusal(longer)


def test_a_hugging_face_folder(exported: Path, tmp_path: Path, write_config: Callable[..., Path]) -> None:
    config = write(write_config, exported)
    (line,) = check(config)
    assert line.startswith(f"distilled from {exported}: tokenformer, 2 layers of 32, ")
    assert "could be compared" not in line
    message = refusal(write(write_config, exported, iteration=3))
    assert "is a Hugging Face folder, which has no steps: leave distillation.iteration out." in message
    folder = Path(shutil.copytree(exported, tmp_path / "hf"))
    config = write(write_config, folder)
    (folder / "tokenizer.json").unlink()
    (line,) = check(config)
    assert line.endswith("; it has no tokenizer.json, so that only the number of tokens could be compared")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"vocab_size": 500}))
    assert "has a vocabulary of 500 rows, and this run's tokenizer 512 ids" in refusal(config)
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "bert"}))
    assert "model_type 'bert' cannot be imported" in refusal(config)


def test_a_hugging_face_folder_of_another_tokenizer(
    exported: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    swapped = json.loads((exported / "tokenizer.json").read_text())
    vocabulary = swapped["model"]["vocab"]
    a, b = [name for name, number in vocabulary.items() if number in (65, 66)]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    folder = Path(shutil.copytree(exported, tmp_path / "hf"))
    (folder / "tokenizer.json").write_text(json.dumps(swapped))
    config = write(write_config, folder)
    assert "is another tokenizer than this run's: id 65 is 'B', and this run's 'A'" in refusal(config)


def stage_of(path: Path, write_config: Callable[..., Path]) -> TeacherStage:
    config = load_config([write(write_config, path)]).run
    teacher = find_teacher(config, "sizes")
    assert teacher is not None
    speedups = choose_speedups(config.speedups, config.training.precision, config.training.optimizer, on_gpu=False)
    single, cpu = ParallelContext.single(), torch.device("cpu")
    return TeacherStage(teacher, config.parallel, config.training.precision, speedups, single, cpu, 3)


@pytest.mark.parametrize("name", MODELS)
def test_a_stage_computes_what_its_teacher_does(name: str, tmp_path: Path, write_config: Callable[..., Path]) -> None:
    """Its logits are the model's, bit for bit; the batches are handed on as they are."""
    teacher = make_checkpoint(write_yaml(tmp_path, MODELS[name]), tensor=2)
    stage = stage_of(teacher.path, write_config)
    inputs = tokens()
    batch = (inputs, (inputs + 1, torch.ones(inputs.shape)))
    batches = iter([batch] * 3)
    taught = list(stage.attach(batches, 2))
    assert len(taught) == 2 and len(list(batches)) == 1
    found, (labels, weights, output) = taught[1]  # type: ignore[misc]
    assert found is inputs and (labels is batch[1][0]) and (weights is batch[1][1])
    want = whole_model(teacher.config)(inputs).detach()[..., :512]
    assert torch.equal(stage.local_logits(output)[..., :512], want)
    assert not any(parameter.requires_grad for parameter in stage.modules.parameters())


def test_a_stage_of_an_export_is_that_of_its_checkpoint(
    tokenformer: Checkpoint, exported: Path, write_config: Callable[..., Path]
) -> None:
    ours, theirs = (dict(stage_of(path, write_config).modules.named_parameters())
                    for path in (tokenformer.path, exported))  # fmt: skip
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_teachers_of_any_layout_and_architecture(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    other = make_checkpoint(write_yaml(tmp_path, PYTHIA | {"hidden_size": 64, "num_layers": 5}), tensor=2, pipe=3)
    (line,) = check(write(write_config, other.path.parent), "model_parallel_size=4", "pipe_parallel_size=2")
    assert "gpt_neox, 5 layers of 64" in line
