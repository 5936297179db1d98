"""Ctrl-C ends every command in one line, with exit code 130, whatever it is at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.checkpointing.store.checkpoint import Checkpoint
from tests.helpers.configs import TOKENFORMER
from tests.helpers.runs import ROOT


def interrupt(command: list[str], ready: Callable[[int], bool]) -> tuple[int, str]:
    """Runs `python COMMAND` and interrupts it when it is ready, with all its processes, as a terminal does.

    Returns its exit code and what it said.
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not ready(process.pid):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    return process.returncode, said


def loads(library: str) -> Callable[[int], bool]:
    """Ready when the process begins to load a library."""
    return lambda pid: library in Path(f"/proc/{pid}/maps").read_text()


def assert_one_line(ended: tuple[int, str]) -> None:
    code, said = ended
    assert code == 130, said
    assert said.splitlines()[-1:] == ["interrupted"] and "Traceback" not in said and "Error" not in said, said


@pytest.mark.parametrize(
    ("command", "library"),
    [
        (["deepy.py", "train.py", "configs/demo.yml", "--check"], "pydantic_core"),
        pytest.param(["generate.py", "configs/demo.yml", "load=x"], "libtorch_cpu", marks=pytest.mark.full),
        (["tools/plots/plot_runs.py", "nowhere"], "numpy"),
        pytest.param(["eval.py", "configs/demo.yml", "--eval_tasks", "x"], "libtorch_cpu", marks=pytest.mark.full),
        pytest.param(["tools/ckpts/grow.py", "--help"], "pydantic_core", marks=pytest.mark.full),
    ],
)
def test_during_imports(command: list[str], library: str) -> None:
    assert_one_line(interrupt(command, loads(library)))


@pytest.mark.full
@pytest.mark.parametrize("workers", [1, 2])
def test_while_text_is_tokenized(workers: int, tmp_path: Path) -> None:
    """Its worker processes are told as well, and say nothing; only what a second run goes on from is left."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {number} of a text"}) + "\n" for number in range(400_000)))
    output = tmp_path / "out"
    output.mkdir()
    command = ["tools/datasets/preprocess_data.py", "--input", str(text), "--output-prefix", str(output / "data")]
    command += ["--tokenizer-type", "CharLevelTokenizer", "--workers", str(workers)]
    assert_one_line(interrupt(command, lambda pid: any(path.stat().st_size > 10_000 for path in output.iterdir())))
    assert all(path.name.endswith((".partial", ".progress.json")) for path in output.iterdir())


@pytest.mark.full
def test_while_text_is_generated(tokenformer: Checkpoint, tmp_path: Path) -> None:
    config = tmp_path / "config.yml"
    generation = {"text_gen_type": "unconditional", "num_samples": 100_000, "sample_output_file": str(tmp_path / "out")}
    padding = {"make_vocab_size_divisible_by": 100}
    config.write_text(json.dumps(TOKENFORMER | padding | generation | {"load": str(tokenformer.path)}))
    command = ["deepy.py", "generate.py", str(config)]
    assert_one_line(
        interrupt(command, lambda pid: (tmp_path / "out").exists() and (tmp_path / "out").stat().st_size > 0)
    )


def test_while_the_demo_runs_a_command(tmp_path: Path) -> None:
    """The command has been told as well: it says so, and the demo waits for it; nothing of it is left."""
    words = ["tools/demo.py", "--output-dir", str(tmp_path / "demo")]
    code, said = interrupt(words, lambda pid: any(tmp_path.glob("demo.part-*/demo/data/train.jsonl")))
    assert (code, said) == (130, "interrupted\n")
    assert not list(tmp_path.iterdir())
