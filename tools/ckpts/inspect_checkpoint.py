"""Shows what a checkpoint holds, whether it is whole, and how its configuration differs from YAML files.

    python tools/ckpts/inspect_checkpoint.py runs/150M
    python tools/ckpts/inspect_checkpoint.py runs/150M/global_step1000 --optimizer --json
    python tools/ckpts/inspect_checkpoint.py runs/150M --iteration 1000 --config_file configs/tokenformer/150M.yml

A run's folder stands for its newest checkpoint, whose files are compared with their hashes (--verify); of the others,
the sizes. Parameters have their global names and are merged over tensor-parallel ranks. The exit code is 1 when
anything is damaged.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from megatron_tokenformer import run_tool

from megatron.checkpointing.store.manifest import damage, unlisted
from megatron.config.effective_config import changed_values
from megatron.config.load_config import load_words
from megatron.config.local_path import local_path
from megatron.config.sections.checkpoint import Verification
from megatron.config.yaml.problems import show
from megatron.errors import CheckpointError
from tools.command_line import add_config_file, progress_bar, stay_on_cpu, tool_parser

if TYPE_CHECKING:
    from megatron.checkpointing.convert.tensor_summary import TensorSummary
    from megatron.checkpointing.store.checkpoint import Checkpoint

Advance = Callable[[int], None]


def main(argv: Sequence[str]) -> int:
    """Prints the report. Returns 1 when something is damaged."""
    args = parse_args(argv)
    stay_on_cpu()
    checkpoint, others = locate(args.path, args.iteration)
    problems = verify(checkpoint, args.verify)
    report = describe(checkpoint) | {"verified": args.verify, "problems": problems, "others": others}
    if args.config_file:
        report["differences"] = compare(checkpoint, args.config_file)
    if not problems and not args.no_tensors:
        report["tensors"] = [asdict(summary) for summary in summarize(checkpoint, args.optimizer)]
        report["parameters"] = sum(math.prod(tensor["shape"]) for tensor in report["tensors"])
    print(json.dumps(finite(report), indent=1) if args.json else "\n".join(text_of(report)))
    return 1 if problems or any(other["problems"] for other in others) else 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses which checkpoint to inspect, and how much of it."""
    parser = tool_parser(__doc__)
    parser.add_argument("path", type=local_path, help="a run's folder, or a global_stepN folder")
    parser.add_argument("--iteration", type=int, help="step of the checkpoint in a run's folder (the newest)")
    add_config_file(parser, "configuration to compare with")
    parser.add_argument("--verify", choices=get_args(Verification), default="full", help="hashes too, or sizes (full)")
    parser.add_argument("--optimizer", action="store_true", help="norms of the optimizer's state as well")
    parser.add_argument("--no-tensors", action="store_true", help="leave the parameters out")
    parser.add_argument("--json", action="store_true", help="print JSON; numbers that are not finite are null")
    return parser.parse_args(argv)


def locate(path: Path, iteration: int | None) -> tuple[Checkpoint, list[dict[str, Any]]]:
    """Finds the checkpoint that is asked for, and what else lies in a run's folder.

    Raises CheckpointError when there is none, or it cannot be read.
    """
    from megatron.checkpointing.store.checkpoint import CHECKPOINT_NAME, checkpoint_name
    from megatron.checkpointing.store.find_checkpoint import survey

    if CHECKPOINT_NAME.fullmatch(path.resolve().name):
        return readable(path), []
    if iteration is not None:
        return readable(path / checkpoint_name(iteration)), []
    found, rejected = survey(path)
    others = [{"name": checkpoint_name(step), "problems": [reason]} for step, reason in sorted(rejected)]
    if not found:
        reasons = "".join(f"\n  {problem}" for other in others for problem in other["problems"])
        raise CheckpointError(f"{path} holds no checkpoint that can be read.{reasons}\nName a run's folder.")
    others += [{"name": each.path.name, "problems": verify(each, "sizes")} for each in found[1:] if each.path.is_dir()]
    return found[0], others


def readable(path: Path) -> Checkpoint:
    """Reads the checkpoint in a folder. Raises CheckpointError, with the path, when it cannot be read."""
    from megatron.checkpointing.store.checkpoint import read_checkpoint

    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. It is damaged, or not of this trainer.") from error


def verify(checkpoint: Checkpoint, level: Verification) -> list[str]:
    """Compares the files with the manifest, and describes each that is damaged in a sentence.

    Raises CheckpointError when the checkpoint was removed meanwhile.
    """
    files = checkpoint.manifest.files
    problems = [f"{name} is not in its manifest" for name in unlisted(checkpoint.path, files)]
    with shown_progress("verifying", sum(entry.size for entry in files.values())) as advance:
        for name, entry in files.items():
            problems += damage(checkpoint.path, {name: entry}, level)
            advance(entry.size)
    if problems:
        from megatron.checkpointing.store.find_checkpoint import require_still_there

        require_still_there(checkpoint.path)
    return problems


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Collects state, manifest and sizes."""
    files = checkpoint.manifest.files
    weights = sum(entry.size for name, entry in files.items() if name.startswith("layer_"))
    return {
        "path": str(checkpoint.path),
        "state": asdict(checkpoint.state) | {"growth": [each.model_dump() for each in checkpoint.state.growth]},
        "layout": checkpoint.manifest.layout,
        "run_id": checkpoint.manifest.run_id,
        "sequence": checkpoint.manifest.sequence,
        "versions": checkpoint.manifest.versions,
        "files": len(files),
        "bytes": sum(entry.size for entry in files.values()),
        "bytes_of_weights": weights,
        "weights_only": checkpoint.holds_weights_alone,
    }


def compare(checkpoint: Checkpoint, words: Sequence[str]) -> list[dict[str, Any]]:
    """Lists the keys whose values differ between the checkpoint's configuration and YAML files and overrides."""
    given = load_words(words).run
    found = changed_values(checkpoint.config, given)
    return [{"key": each.key, "checkpoint": each.first, "given": each.second} for each in found]


def summarize(checkpoint: Checkpoint, optimizer: bool) -> Iterator[TensorSummary]:
    """Yields a summary of every parameter, with a progress bar.

    Raises CheckpointError for an optimizer's state that a checkpoint of weights alone does not have.
    """
    from megatron.checkpointing.convert.tensor_summary import summarize_tensors
    from megatron.checkpointing.states.parameter_layout import layer_layouts

    if optimizer and checkpoint.holds_weights_alone:
        raise CheckpointError(f"{checkpoint.path} holds weights alone. Leave --optimizer out.")
    layouts = layer_layouts(checkpoint.config.model, checkpoint.vocab)
    with shown_progress("reading", sum(len(layout.parameters) for layout in layouts)) as advance:
        for summary in summarize_tensors(checkpoint, optimizer=optimizer):
            advance(1)
            yield summary


@contextmanager
def shown_progress(what: str, total: int) -> Iterator[Advance]:
    """Shows a progress bar that disappears at the end; yields the function that advances it."""
    with progress_bar(transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


def finite(value: Any) -> Any:
    """Replaces numbers that JSON cannot hold by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text_of(report: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of a report."""
    state, layout, versions = report["state"], report["layout"], report["versions"]
    yield report["path"]
    yield f"  step            {state['iteration']:,}"
    trained, validated = state["consumed_train_samples"], state["consumed_valid_samples"]
    yield f"  samples read    {trained:,} training, {validated:,} validation"
    yield f"  layout          {', '.join(f'{name} {size}' for name, size in layout.items())}"
    yield f"  vocabulary      {state['vocab_size']:,}, padded to {state['padded_vocab_size']:,}"
    for growth in state["growth"]:
        sizes = ", ".join(
            f"{name} {size} > {growth['after'][name]}"
            for name, size in growth["before"].items()
            if growth["after"][name] != size
        )
        yield f"  grown           at step {growth['iteration']:,} by {growth['rules']['operator']}: {sizes}"
    yield f"  run             {report['run_id']}, save {report['sequence']}"
    yield f"  written by      {', '.join(f'{name} {version}' for name, version in versions.items() if version)}"
    sizes = f"{mebibytes(report['bytes'])} MiB, {mebibytes(report['bytes_of_weights'])} of them weights"
    yield f"  files           {report['files']:,}, {sizes}{'; no optimizer state' if report['weights_only'] else ''}"
    yield f"  {'verified':<16}{report['verified']}: {'DAMAGED' if report['problems'] else 'whole'}"
    yield from (f"    {problem}" for problem in report["problems"])
    if report["others"]:
        yield "other checkpoints there, by their sizes"
        yield from (f"  {each['name']:<24}{'; '.join(each['problems']) or 'whole'}" for each in report["others"])
    if "tensors" in report:
        yield from table_of(report["tensors"])
        yield f"{report['parameters']:,} parameters"
    if "differences" in report:
        yield f"{len(report['differences'])} differences of the configuration"
        for each in report["differences"]:
            yield f"  {each['key']}: checkpoint {show(each['checkpoint'])}, given {show(each['given'])}"


def table_of(tensors: list[dict[str, Any]]) -> Iterator[str]:
    """Yields a heading, then a line for each parameter."""
    states = list(tensors[0]["optimizer_norms"])
    width = max(len(tensor["name"]) for tensor in tensors)
    heads = ("norm", "largest", *(f"{state} norm" for state in states))
    yield f"{'parameter':<{width}}  {'shape':<16}{'type':<10}" + "".join(f"{head:>16}" for head in heads)
    for tensor in tensors:
        numbers = (tensor["norm"], tensor["largest"], *(tensor["optimizer_norms"][state] for state in states))
        shape = " x ".join(map(str, tensor["shape"]))
        warning = f"  {tensor['not_finite']:,} NOT FINITE" if tensor["not_finite"] else ""
        line = f"{tensor['name']:<{width}}  {shape:<16}{tensor['dtype']:<10}"
        yield line + "".join(f"{number:>16.6g}" for number in numbers) + warning


def mebibytes(size: int) -> str:
    """Formats a size of bytes in MiB, with one decimal."""
    return f"{size / 2**20:,.1f}"


if __name__ == "__main__":
    run_tool(main)
