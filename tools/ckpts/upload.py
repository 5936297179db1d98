"""Uploads an exported folder, or all checkpoints of a run, to the Hugging Face hub.

    python tools/ckpts/upload.py exports/150M my-org/tokenformer-150m [BRANCH]
    python tools/ckpts/upload.py runs/150M my-org/tokenformer-150m --config_file configs/tokenformer/150M.yml --dry-run

The second form exports every checkpoint of the run, one at a time, to the branch stepN, and the newest to main as well;
started again, it goes on where it was interrupted. The token is that of HF_TOKEN or of `hf auth login`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_tokenformer import run_tool

from megatron.config.load_config import load_words
from megatron.config.local_path import local_path
from megatron.config.run_yaml import RUN_YAML
from megatron.errors import CheckpointError
from megatron.registry import install_extra, require
from tools.ckpts.export_flags import add_export_flags
from tools.command_line import add_config_file, tool_parser


def main(argv: Sequence[str]) -> int:
    """Uploads what the command line names, or prints what would be uploaded."""
    args = parse_args(argv)
    for package in ("transformers", "huggingface_hub"):
        require(package, "upload.py", install_extra("hf"))
    if args.config_file is None and (args.branch is not None or not (args.folder / RUN_YAML).is_file()):
        upload_export(args)
    else:
        upload_checkpoints(args)
    return 0


def upload_export(args: argparse.Namespace) -> None:
    """Uploads one exported folder."""
    from megatron.hf.upload import LAST_FILE, MAIN, describe_folder, repository, upload_folder

    if not (args.folder / LAST_FILE).is_file():
        raise CheckpointError(
            f"{args.folder} is no exported folder: it has no {LAST_FILE}. For checkpoints without {RUN_YAML}, give "
            "--config_file."
        )
    branch = args.branch or MAIN
    if args.dry_run:
        print(f"{args.repo}@{branch}: would get {describe_folder(args.folder)} from {args.folder}")
        return
    with repository(args.repo, private=args.private) as api:
        upload_folder(api, args.folder, args.repo, branch, print)


def upload_checkpoints(args: argparse.Namespace) -> None:
    """Exports and uploads every checkpoint of a run."""
    from megatron.checkpointing.store.find_checkpoint import readable_checkpoints
    from megatron.hf.export_checkpoint import ExportOptions
    from megatron.hf.upload import planned_branches, repository, upload_run

    run = load_words(args.config_file or [str(args.folder)]).run
    checkpoints = readable_checkpoints(args.folder)
    if not checkpoints:
        raise CheckpointError(f"{args.folder} holds no checkpoints. Name a run's folder.")
    if args.dry_run:
        for checkpoint, branch in planned_branches(checkpoints):
            print(f"{args.repo}@{branch}: would get an export of {checkpoint.path}")
        return
    options = ExportOptions(precision=args.precision, trim_vocab=args.trim_vocab)
    with repository(args.repo, private=args.private) as api:
        upload_run(api, checkpoints, run, args.repo, options, print)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses folder, repository and branch as in NeoX, and the options of an export."""
    parser = tool_parser(__doc__)
    parser.add_argument("folder", type=local_path, help="an exported folder, or a run's folder")
    parser.add_argument("repo", help="repository, as in my-org/my-model; made if it is not there")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("branch", nargs="?", help="branch for an exported folder (main)")
    add_config_file(which, "the YAML files of a run that has kept none")
    add_export_flags(parser)
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded, and reach for no network")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_tool(main)
