"""Does the main job in one go: real text, tokenizer, dataset, training, evaluation, loss curve, samples.

Every step is a command that a user could type, and is printed before it runs. Everything lands in ./demo.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_tokenformer import run_tool

from megatron.errors import INTERRUPTED, UserError
from tools.command_line import tool_parser

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("demo")
DATA = FOLDER / "data"
RUN = FOLDER / "run"
CURVE = FOLDER / "loss.png"
SAMPLES = FOLDER / "samples.jsonl"
CONFIG = "configs/demo.yml"
SHOWN_CHARACTERS = 200


class DemoError(UserError):
    """A step of the demo ended with an error, which it has printed itself."""


def main(argv: Sequence[str]) -> int:
    """Runs all steps, then prints a report."""
    parser = tool_parser(__doc__)
    parser.add_argument("--text", type=Path, help="your own text, .txt or .jsonl, instead of Python's")
    text: Path | None = parser.parse_args(argv).text
    started = time.monotonic()
    if FOLDER.is_dir():
        for leftover in (DATA, RUN):
            shutil.rmtree(leftover, ignore_errors=True)
    prepare = ["tools/datasets/prepare_data.py", "--output-dir", str(DATA)]
    run(prepare + (["--text", str(text.resolve())] if text else []))
    run(["deepy.py", "train.py", CONFIG])
    data = json.loads((DATA / "data.json").read_text())
    unigram = data["valid_unigram_nats_per_token"]
    reference = ["--reference", f"{unigram:.4f}", "unigram model"]
    run(["tools/plots/plot_runs.py", str(RUN), "--output", str(CURVE), *reference])
    run(["deepy.py", "generate.py", CONFIG, f"load={RUN}", f"sample_output_file={SAMPLES}"])
    report(unigram, time.monotonic() - started)
    return 0


def run(arguments: list[str]) -> None:
    """Runs one command of the project in its root folder. Raises DemoError when it fails."""
    print(f"\n$ python {' '.join(arguments)}", flush=True)
    with subprocess.Popen([sys.executable, *arguments], cwd=ROOT) as command:
        try:
            code = command.wait()
        except KeyboardInterrupt:
            # The terminal has told the command as well, which says so.
            command.wait()
            sys.exit(INTERRUPTED)
    if code != 0:
        raise DemoError(f"`python {' '.join(arguments)}` ended with exit code {code}; its message is above.")


def report(unigram: float, seconds: float) -> None:
    """Prints what was learned and where everything lies."""
    records = [json.loads(line) for line in (ROOT / RUN / "metrics.jsonl").read_text().splitlines()]
    loss = [record["valid/lm_loss"] for record in records if "valid/lm_loss" in record][-1]
    print("\nThree samples from the trained model:")
    for line in (ROOT / SAMPLES).read_text().splitlines()[:3]:
        text = json.loads(line)["text"]
        print("  | " + text[:SHOWN_CHARACTERS].replace("\n", "\n  | "))
    print(f"\nheld-out loss, unigram model   {unigram:.3f} nats per token")
    print(f"held-out loss, TokenFormer     {loss:.3f} nats per token ({unigram - loss:+.3f} better)")
    print(f"\ntokenizer and datasets   {DATA}/\ncheckpoints and metrics  {RUN}/")
    print(f"loss curve               {CURVE}\nall samples              {SAMPLES}\nconfiguration            {CONFIG}")
    print(f"took {seconds:.0f} s")


if __name__ == "__main__":
    run_tool(main)
