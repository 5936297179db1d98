"""Publishes exported folders: one to a branch, or every checkpoint of a run to a branch of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.sections.run_config import RunConfig
from megatron.errors import EnvironmentSetupError
from megatron.hf.export_checkpoint import ExportOptions, export_checkpoint
from megatron.hf.model_card import Publication

MAIN = "main"
LAST_FILE = "config.json"
"""Every export has it, and a commit holds the whole folder: a branch that has it is complete."""

Report = Callable[[str], None]
"""Takes a line for the user."""


@contextmanager
def repository(repo: str, *, private: bool) -> Iterator[HfApi]:
    """Opens the hub, and makes the repository if it is not there.

    Raises EnvironmentSetupError without a token, and when the hub refuses or cannot be reached.
    """
    if get_token() is None:
        raise EnvironmentSetupError("The hub needs a token. Set HF_TOKEN in the environment, or run `hf auth login`.")
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        yield api
    except (HfHubHTTPError, HFValidationError, HTTPError) as error:
        raise EnvironmentSetupError(
            f"{repo}: {error}. Check the name, that the token may write there, and the connection; then start again."
        ) from error


def upload_folder(api: HfApi, folder: Path, repo: str, branch: str, report: Report) -> None:
    """Commits a folder to a branch of an existing repository.

    A new branch starts from the repository's first commit, so that it holds nothing else.
    """
    if branch != MAIN:
        first = api.list_repo_commits(repo)[-1].commit_id
        api.create_branch(repo, branch=branch, revision=first, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder, revision=branch, commit_message=f"Add {folder.name}")
    report(f"{repo}@{branch}: {describe_folder(folder)}")


def upload_run(
    api: HfApi, checkpoints: list[Checkpoint], run: RunConfig, repo: str, options: ExportOptions, report: Report
) -> None:
    """Exports each checkpoint and commits it to the branch stepN; the newest goes to the main branch as well.

    One export is on disk at a time. Branches that are complete are skipped, so an interrupted upload can be
    started again.
    """
    for checkpoint, branch in planned_branches(checkpoints):
        if branch != MAIN and api.file_exists(repo, LAST_FILE, revision=branch):
            report(f"{repo}@{branch}: is there already")
            continue
        revision = None if branch == MAIN else branch
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / checkpoint.path.name
            export_checkpoint(checkpoint, run, folder, replace(options, published_as=Publication(repo, revision)))
            upload_folder(api, folder, repo, branch, report)


def planned_branches(checkpoints: list[Checkpoint]) -> list[tuple[Checkpoint, str]]:
    """Pairs each checkpoint with its branch, named as Pythia's, in order; then the newest with the main branch."""
    checkpoints = sorted(checkpoints, key=lambda checkpoint: checkpoint.state.iteration)
    return [*((found, f"step{found.state.iteration}") for found in checkpoints), (checkpoints[-1], MAIN)]


def describe_folder(folder: Path) -> str:
    """Describes number and size of a folder's files."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return f"{len(sizes)} files, {sum(sizes):,} bytes"
