"""Uploads, against a hub that only takes notes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.find_checkpoint import readable_checkpoints
from megatron.errors import CheckpointError, EnvironmentSetupError
from megatron.hf import upload as uploading
from megatron.hf.export_checkpoint import ExportOptions
from megatron.hf.upload import repository, upload_folder, upload_run
from tests.helpers.tiny_checkpoints import MODELS, make_checkpoint, write_yaml
from tools.ckpts import upload

REPO = "my-org/tiny"


@dataclass
class NotedHub:
    """Keeps the files of each branch, as the hub would."""

    branches: dict[str, dict[str, str]] = field(default_factory=lambda: {"main": {}})
    started_from: list[str] = field(default_factory=list)

    def create_repo(self, repo: str, **options: Any) -> None:
        assert repo == REPO

    def list_repo_commits(self, repo: str) -> list[Any]:
        return [type("Commit", (), {"commit_id": commit}) for commit in ("newest", "first")]

    def create_branch(self, repo: str, *, branch: str, revision: str, exist_ok: bool) -> None:
        self.started_from.append(revision)
        self.branches.setdefault(branch, {})

    def file_exists(self, repo: str, name: str, *, revision: str) -> bool:
        return name in self.branches.get(revision, {})

    def upload_folder(self, *, repo_id: str, folder_path: Path, revision: str, commit_message: str) -> None:
        self.branches[revision] = {
            path.name: path.read_text(encoding="utf-8", errors="replace") for path in folder_path.iterdir()
        }


@pytest.fixture
def run_with_two_steps(tokenformer: Checkpoint, tmp_path: Path) -> tuple[Path, list[Checkpoint]]:
    """YAML and checkpoints of a run that has saved twice."""
    config = write_yaml(tmp_path, MODELS["l2_norm_gelu"])
    checkpoints = [make_checkpoint(config, iteration=iteration) for iteration in (512, 1000)]
    return config, checkpoints


def test_every_checkpoint_becomes_a_branch_with_its_card(run_with_two_steps: tuple[Path, list[Checkpoint]]) -> None:
    _, checkpoints = run_with_two_steps
    hub, lines = NotedHub(), []
    upload_run(hub, checkpoints[::-1], checkpoints[0].config, REPO, ExportOptions(), lines.append)
    assert list(hub.branches) == ["main", "step512", "step1000"]
    assert hub.started_from == ["first", "first"]
    assert "| step 512 |" in hub.branches["step512"]["README.md"]
    assert (
        f'from_pretrained("{REPO}", revision="step512", trust_remote_code=True)' in hub.branches["step512"]["README.md"]
    )
    assert "| step 1,000 |" in hub.branches["main"]["README.md"]
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in hub.branches["main"]["README.md"]
    assert hub.branches["main"].keys() >= {"config.json", "model.safetensors", "modeling_tokenformer.py"}

    del hub.branches["step1000"]["config.json"]  # as if interrupted
    kept = hub.branches["step512"]
    upload_run(hub, checkpoints, checkpoints[0].config, REPO, ExportOptions(), lines.append)
    assert hub.branches["step512"] is kept
    assert "config.json" in hub.branches["step1000"]
    assert f"{REPO}@step512: is there already" in lines


def test_a_folder_goes_to_the_main_branch_or_the_named_one(exported: Path) -> None:
    hub, lines = NotedHub(), []
    upload_folder(hub, exported, REPO, "main", lines.append)
    upload_folder(hub, exported, REPO, "other", lines.append)
    assert hub.branches["main"] == hub.branches["other"]
    assert hub.started_from == ["first"]


def test_dry_run_reaches_for_no_network(
    exported: Path,
    run_with_two_steps: tuple[Path, list[Checkpoint]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uploading, "HfApi", None)
    monkeypatch.setattr(uploading, "get_token", None)
    assert upload.main([str(exported), REPO, "--dry-run"]) == 0
    config, checkpoints = run_with_two_steps
    run = checkpoints[0].path.parent
    assert upload.main([str(run), REPO, "--config_file", str(config), "--dry-run"]) == 0
    first, *steps = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{REPO}@main: would get 7 files, ")
    assert [line.split(":")[0] for line in steps] == [f"{REPO}@step512", f"{REPO}@step1000", f"{REPO}@main"]
    assert str(checkpoints[1].path) in steps[-1]
    assert len(readable_checkpoints(run)) == 2


def test_without_a_token_the_user_learns_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploading, "get_token", lambda: None)
    with pytest.raises(EnvironmentSetupError, match="HF_TOKEN"), repository(REPO, private=True):
        pass


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        upload.main([str(tmp_path), REPO, "--dry-run"])
