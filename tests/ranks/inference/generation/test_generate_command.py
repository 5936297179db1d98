"""`python deepy.py generate.py`: prompts in, JSON lines out; and a conversation in a terminal."""

from __future__ import annotations

import json
import os
import pty
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.sections.data import TokenizerConfig
from megatron.data.tokenizers.char_level import CharLevelTokenizer
from megatron.inference.generation.conversation_terminal import CONTROLS
from tests.helpers.commands import run_command
from tests.helpers.configs import TOKENFORMER
from tests.helpers.runs import ROOT, run_ranks

Record = dict[str, Any]


@pytest.fixture(scope="module")
def trained(tokenformer: Checkpoint) -> Path:
    """The YAML of a run that has left a checkpoint, and whose vocabulary is the bytes."""
    return tokenformer.path.parents[1] / "run.yml"


def records_of(config: Path, *settings: str, ranks: int = 1) -> list[Record]:
    """What generate.py writes, without the seconds that it took."""
    output = config.parent / "samples.jsonl"
    finished = run_ranks(config, *settings, f"sample_output_file={output}", script="generate", ranks=ranks)
    assert finished.code == 0, finished.output
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(record.pop("duration_seconds") > 0 for record in records)
    return records


def write_prompts(folder: Path, text: str) -> list[str]:
    """The settings that read prompts from a file of this text."""
    path = folder / "prompts.txt"
    path.write_text(text)
    return ["text_gen_type=input-file", f"sample_input_file={path}"]


def test_the_command_writes_the_records_of_neox(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "samples.jsonl"
    settings = [*write_prompts(tmp_path, "Two words\nthree more words\n"), "maximum_tokens=6", "num_samples=2"]
    finished = run_command(
        ["deepy.py", "generate.py", str(trained), "temperature=1.0", f"sample_output_file={output}", *settings]
    )
    assert finished.returncode == 0, finished.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["context"] for record in records] == ["Two words"] * 2 + ["three more words"] * 2
    assert set(records[0]) == {"context", "text", "length", "finished", "message", "duration_seconds"}
    assert [{**record, "duration_seconds": None} for record in records] == [
        {**record, "duration_seconds": None} for record in records_of(trained, "temperature=1.0", *settings)
    ], "the same seed samples the same text"
    assert len({record["text"] for record in records}) == 4


def test_empty_short_and_long_prompts(trained: Path, tmp_path: Path) -> None:
    prompts = ["", "a", "sixteen tokens..", "", "x" * 40, "  spaces  "]
    records = records_of(trained, *write_prompts(tmp_path, "\n".join(prompts)), "maximum_tokens=8")
    assert [record["context"] for record in records] == prompts
    empty, one, full, again, long, spaces = records
    assert empty["message"] == again["message"] == "the prompt is empty: this is how a document starts"
    assert empty["text"] == again["text"] and empty["length"] == 8
    assert one["message"] is None
    assert "of the prompt's 16 tokens the last 8 were read" in full["message"] and full["length"] == 8
    assert "of the prompt's 40 tokens the last 8 were read" in long["message"]
    more = records_of(trained, *write_prompts(tmp_path, "  spaces  \n"), "maximum_tokens=99")[0]
    assert (more["length"], more["message"]) == (8, "of the prompt's 10 tokens the last 8 were read: it and "
        "maximum_tokens are more than seq_length 16; the sequence has reached seq_length 16")  # fmt: skip
    assert spaces["length"] == 8 and spaces["message"] is not None


def test_layouts_batches_and_the_cache_change_nothing(trained: Path, tmp_path: Path) -> None:
    settings = [*write_prompts(tmp_path, "one\ntwo two\n\nfour\nfive five 5\n"), "num_samples=2", "maximum_tokens=5"]
    settings += ["temperature=1.0", "top_k=50", "top_p=0.95"]
    want = records_of(trained, *settings)
    one_by_one = ["train_micro_batch_size_per_gpu=1", "recompute=true", "pipe_parallel_size=2"]
    assert want == records_of(trained, *settings, *one_by_one)
    assert want == records_of(trained, *settings, "model_parallel_size=2", ranks=2)
    assert want == records_of(trained, *settings, ranks=2)
    assert want != records_of(trained, *settings, "seed=8")


def test_logits_come_with_every_token(trained: Path) -> None:
    record = records_of(trained, "return_logits=true", "maximum_tokens=3")[0]
    assert [len(logits) for logits in record["logits"]] == [512] * record["length"]
    chosen = [logits.index(max(logits)) for logits in record["logits"]]
    assert record["text"] == CharLevelTokenizer(TokenizerConfig()).detokenize(chosen) and record["context"] == ""


def test_prompts_may_hold_lines(trained: Path, tmp_path: Path) -> None:
    settings = write_prompts(tmp_path, "def f():\n    return\nENDsecond\nEND\n")
    records = records_of(trained, *settings, "prompt_end=END", "maximum_tokens=2")
    assert [record["context"] for record in records] == ["def f():\n    return\n", "second\n"]


def test_nothing_to_sample_from(write_config: Callable[..., Path]) -> None:
    finished = run_ranks(write_config(TOKENFORMER), script="generate")
    assert finished.code == 1
    assert "holds no checkpoint to read" in finished.output and "Traceback" not in finished.output


class TerminalSession:
    """generate.py with its three streams in a terminal, of which it is the foreground job."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TERM": "dumb"}
            os.execve(sys.executable, [sys.executable, "deepy.py", "generate.py", *arguments], environment)  # noqa: S606
        self.output = ""

    def read_until(self, text: str, timeout: float = 120.0) -> str:
        """What has come up to and with the next `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.output:
            assert self._read(deadline), f"{text!r} has not come: {self.output!r}"
        before, _, self.output = self.output.partition(text)
        return before + text

    def _read(self, deadline: float) -> bool:
        with selectors.DefaultSelector() as selector:  # select() refuses the descriptors of a process with many
            selector.register(self.terminal, selectors.EVENT_READ)
            if not selector.select(max(deadline - time.monotonic(), 0.0)):
                return False
        try:
            data = os.read(self.terminal, 4096)
        except OSError:  # the other end is closed
            return False
        self.output += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def end(self) -> tuple[int, str]:
        """Exit code, and what has come since; kills what does not end in half a minute."""
        deadline = time.monotonic() + 30.0
        while self._read(deadline):
            pass
        if time.monotonic() > deadline:
            os.kill(self.pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.terminal)
        return code, self.output


CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.mark.parametrize(
    "settings",
    [pytest.param([], marks=pytest.mark.full), ["num_gpus=2", "model_parallel_size=2"]],
    ids=["one rank", "TP=2"],
)
def test_a_conversation(trained: Path, tmp_path: Path, settings: list[str]) -> None:
    prompts = ["Hello world", "three words, here", "x"]
    output = tmp_path / "conversation.jsonl"
    common = ["temperature=1.0", "maximum_tokens=5", "num_samples=2"]
    session = TerminalSession(
        str(trained), "text_gen_type=interactive", f"sample_output_file={output}", *common, *settings
    )
    session.read_until("Context prompt >>> ")
    shown = []
    for prompt in prompts:
        session.type(prompt + "\n")
        shown.append(session.read_until("Context prompt >>> "))
    session.type("\n")
    assert "An empty prompt has nothing to continue." in session.read_until("Context prompt >>> ")
    session.type(CTRL_D)
    code, rest = session.end()
    assert code == 0 and "Traceback" not in rest, rest
    records = [json.loads(line) for line in output.read_text().splitlines()]
    for number, prompt in enumerate(prompts):
        for record in records[2 * number : 2 * number + 2]:
            assert record["context"] == prompt
            visible = record["text"].translate(CONTROLS)
            assert visible in shown[number]
    from_file = records_of(trained, *write_prompts(tmp_path, "\n".join(prompts)), *common)
    assert [record["text"] for record in records] == [record["text"] for record in from_file]


@pytest.mark.parametrize(
    "settings",
    [[], pytest.param(["num_gpus=2", "model_parallel_size=2"], marks=pytest.mark.full)],
    ids=["one rank", "TP=2"],
)
def test_ctrl_c_stops_a_text_and_then_the_conversation(trained: Path, settings: list[str]) -> None:
    long = ["seq_length=100000", "max_position_embeddings=100000", "maximum_tokens=50000", "prompt_end='END'"]
    session = TerminalSession(str(trained), "text_gen_type=interactive", *long, *settings)
    session.read_until("Context prompt >>> ")
    session.type("def f():\n")
    session.read_until("... ")
    session.type("    returnEND\n")
    session.read_until("END\n")
    time.sleep(0.5)
    session.type(CTRL_C)
    assert "[stopped by the user]" in session.read_until("Context prompt >>> ")
    time.sleep(3.0)  # readline misses a signal between its prompt and the wait for a key
    session.type(CTRL_C)
    code, rest = session.end()
    assert code == 0 and "Traceback" not in rest, rest


def test_prompts_through_a_pipe(trained: Path) -> None:
    """Whoever writes them gets the answer to one before writing the next."""
    command = [sys.executable, "deepy.py", "generate.py", str(trained), "text_gen_type=interactive", "maximum_tokens=3"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for prompt in ("two words", "", "more"):
            process.stdin.write(prompt + "\n")
            record = json.loads(process.stdout.readline())
            assert record["context"] == prompt and record["length"] == 3
        process.stdin.close()
        assert process.stdout.read() == ""
    assert process.returncode == 0


def test_a_reader_that_has_seen_enough(trained: Path) -> None:
    command = [sys.executable, "deepy.py", "generate.py", str(trained), "num_samples=2000", "maximum_tokens=3"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert json.loads(process.stdout.readline())["length"] == 3
        process.stdout.close()
        assert "Error" not in process.stderr.read()
    assert process.returncode == 0
