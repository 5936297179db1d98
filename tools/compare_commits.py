"""Compares what two commits compute, bit by bit: a refactoring leaves all of it as it was.

python tools/compare_commits.py BEFORE [AFTER]     AFTER is the working tree unless a commit is given

Trains a fixed set of tiny runs with each: TokenFormer and GPT-NeoX, one rank, two tensor-parallel ranks, two pipeline
stages, bf16, and a resume. Compares losses, gradient norms, every tensor, name and counter of the checkpoints, and the
saved configurations. Then AFTER goes on from BEFORE's checkpoints, which must end where BEFORE's own runs ended.
Ends with 1 when anything differs; entries that AFTER alone writes are named, and are no difference. It takes a few
minutes on two cores, and no GPU.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megatron_tokenformer import run_tool

import yaml
from rich.progress import track

from tools.command_line import tool_parser

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVED_AT = 6, 3

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "output_layer_init_method": "wang_init",
    "hidden_dropout": 0.1,
    "tokenizer_type": "CharLevelTokenizer",
    "train_iters": STEPS,
    "train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8}},
    "gradient_clipping": 1.0,
    "lr_decay_style": "cosine",
    "warmup": 0.2,
    "min_lr": 1e-4,
    "log_interval": 1,
    "eval_interval": SAVED_AT,
    "eval_iters": 1,
    "split": "90, 5, 5",
    "num_workers": 0,
    "checkpoint_factor": SAVED_AT,
    "extra_save_iters": [0],
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tokenformer": {
        "architecture": "tokenformer",
        "norm": "layernorm_nonparam",
        "final_norm": "layernorm",
        "qkv_slot_num": 24,
        "proj_slot_num": 40,
        "ffn_slot_num": 48,
    },
    "gpt_neox": {
        "architecture": "gpt_neox",
        "gpt_j_residual": True,
        "no_weight_tying": True,
        "bias_gelu_fusion": True,
        "init_method": "small_init",
    },
}
SETTINGS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "bf16": {"precision": "bfloat16"},
    "two tensor-parallel ranks": {"num_gpus": 2, "model_parallel_size": 2, "sequence_parallel": True},
    "two stages": {"num_gpus": 2, "pipe_parallel_size": 2},
    "two data-parallel ranks, saved in the background": {"num_gpus": 2, "async_save": True},
}
UNLIKE = frozenset(
    {"run_id", "versions", "sha256", "size", "save", "log_dir", "auto_resume", "config", "config.json", "state.json"}
)
"""Entries that two runs of the same code do not share: who wrote what where, and hashes and sizes of files that say
it."""


@dataclass(frozen=True)
class Difference:
    """One place where two runs are not the same."""

    place: str
    values: str = ""
    """Both sides, in short; nothing for an entry that AFTER alone has."""


@dataclass(frozen=True)
class Code:
    """A checkout."""

    name: str
    folder: Path

    def run(self, *arguments: str) -> None:
        """Runs a command of the checkout. Raises RuntimeError with its output when it fails."""
        # Stands for an install of the checkout, of which the environment has another one or none.
        path = os.pathsep.join([str(self.folder), str(self.folder / "tools" / "start")])
        finished = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(arguments)}\n{finished.stdout}{finished.stderr}")


def main(argv: Sequence[str]) -> int:
    """Trains with both commits and prints what differs; returns the exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("before", help="a commit")
    parser.add_argument("after", nargs="?", help="a commit; the working tree unless given")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        before = stack.enter_context(checkout(arguments.before, folder / "before_code"))
        after = Code("the working tree", ROOT)
        if arguments.after is not None:
            after = stack.enter_context(checkout(arguments.after, folder / "after_code"))
        found, added = compare(before, after, folder)
    if added:
        print(f"{after.name} also writes {', '.join(sorted(added))}")
    print("\n".join(found) if found else f"{before.name} and {after.name} compute the same, bit for bit")
    return int(bool(found))


@contextlib.contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Code]:
    """Checks a commit out into `folder` while the body runs."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield Code(commit, folder)
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def compare(before: Code, after: Code, folder: Path) -> tuple[list[str], set[str]]:
    """Trains every run with both; returns what differs, and what AFTER alone writes. Prints a line for each run."""
    dataset = folder / "data" / "text"
    text = folder / "text.jsonl"
    lines = (ROOT / "LICENSE").read_text("utf-8").split("\n\n")
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines * 4), "utf-8")
    before.run(
        "tools/datasets/preprocess_data.py", "--input", str(text), "--output-prefix", str(dataset),
        "--tokenizer-type", "CharLevelTokenizer", "--append-eod",
    )  # fmt: skip
    data = {"data_path": f"{dataset}_text_document", "index_cache_dir": str(folder / "index")}
    found: list[str] = []
    added: set[str] = set()
    cases = [(architecture, setting) for architecture in ARCHITECTURES for setting in SETTINGS]
    for number, (architecture, setting) in enumerate(track(cases, description="training")):
        keys = BASE | ARCHITECTURES[architecture] | SETTINGS[setting] | data
        runs = [folder / f"{number}.{side}" for side in ("before", "after", "resumed")]
        for code, run in zip((before, after), runs, strict=False):
            train(code, keys, run)
        resume(after, keys, source=runs[0], run=runs[2])
        everything = [*differences(runs[0], runs[1]), *differences(runs[0], runs[2], since=SAVED_AT)]
        differing = [one for one in everything if one.values]
        added |= {one.place.partition("/")[2] for one in everything if not one.values}
        print(f"{architecture}, {setting}: {last_record(runs[1])}: {'DIFFERS' if differing else 'identical'}")
        found += [f"{architecture}, {setting}: {one.place}: {one.values}" for one in differing]
        for run in runs:
            shutil.rmtree(run)
    return found, added


def train(code: Code, keys: dict[str, Any], run: Path) -> None:
    """Trains a run into the folder `run`."""
    config = run.with_suffix(".yml")
    config.write_text(yaml.safe_dump(keys | {"save": str(run)}))
    code.run("deepy.py", "train.py", str(config))


def resume(code: Code, keys: dict[str, Any], source: Path, run: Path) -> None:
    """Goes on in the folder `run` from the checkpoint that `source` has in the middle."""
    step = f"global_step{SAVED_AT}"
    shutil.copytree(source / step, run / step)
    train(code, keys | {"auto_resume": True}, run)


def last_record(run: Path) -> str:
    """Describes where a run ended."""
    record = records(run)[-1]
    return f"step {record['iteration']}, loss {record['train/lm_loss']:.9f}, norm {record['train/grad_norm']:.9f}"


def records(run: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl, without what a clock measured."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    measured = ("iteration", "consumed_tokens", "lm_loss", "perplexity", "learning_rate", "grad_norm", "skipped_steps")
    return [{key: value for key, value in row.items() if key.rpartition("/")[2] in measured} for row in rows]


def differences(before: Path, after: Path, *, since: int = -1) -> Iterator[Difference]:
    """Yields what differs between two runs, in records and checkpoints of steps after `since`."""
    ours, theirs = ([row for row in records(run) if row["iteration"] > since] for run in (before, after))
    for mine, other in zip_longest(ours, theirs):
        if mine != other:
            yield Difference("metrics", f"{mine} and {other}")
    import torch

    steps = {path.name for run in (before, after) for path in run.glob("global_step*")}
    for step in sorted(step for step in steps if int(step.removeprefix("global_step")) > since):
        names = {path.name for run in (before, after) for path in (run / step).glob("*")}
        for name in sorted(names):
            place, files = f"{step}/{name}", [run / step / name for run in (before, after)]
            if not all(file.is_file() for file in files):
                yield Difference(place, "only one of them has it")
            elif name.endswith(".pt"):
                yield from unequal(place, *(torch.load(file, weights_only=False) for file in files))
            elif name.endswith(".json"):
                yield from unequal(place, *(json.loads(file.read_text("utf-8")) for file in files))


def unequal(place: str, before: Any, after: Any) -> Iterator[Difference]:
    """Yields the places where two nested values differ; numbers and tensors are compared bit by bit."""
    if type(before) is not type(after):
        yield Difference(place, f"{type(before).__name__} and {type(after).__name__}")
        return
    inner = [parts(value) for value in (before, after)]
    if inner[0] is None or inner[1] is None:
        if not same(before, after):
            yield Difference(place, f"{before!r:.60} and {after!r:.60}")
        return
    for key in dict.fromkeys([*inner[0], *inner[1]]):
        if key in UNLIKE:
            continue
        if key not in inner[0]:
            yield Difference(f"{place}.{key}")
        elif key not in inner[1]:
            yield Difference(f"{place}.{key}", "only the first has it")
        else:
            yield from unequal(f"{place}.{key}", inner[0][key], inner[1][key])


def parts(value: Any) -> dict[Any, Any] | None:
    """Returns what a container holds, by key or place; None for a tensor or a plain value."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    is_record = type(value).__module__.startswith("deepspeed") and not isinstance(value, Enum)
    return dict(vars(value)) if is_record else None


def same(first: Any, second: Any) -> bool:
    """Tells whether two tensors or plain values of one type are equal; NaN equals itself."""
    import torch

    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return bool(first == second) or (isinstance(first, float) and math.isnan(first) and math.isnan(second))


if __name__ == "__main__":
    run_tool(main)
