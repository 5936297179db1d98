"""Does the main job in one go: real text, tokenizer, dataset, training, evaluation, samples, report.

    python tools/demo.py
    python tools/demo.py --text mine.txt train_iters=1000
    python tools/demo.py --text mine.txt --minutes 10

With --minutes it measures this machine for a few steps, and chooses sizes, steps and learning rate for that time; the
configuration says why.

Every step is a command that a user could type, and is printed before it runs. Everything is built in a folder beside
the demo's, and put in its place when it is whole: demo/, or demo-mine/ for the text mine.txt. A folder that is there
already is left as it is, for it may hold what took long to train.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_tokenformer import run_tool

from megatron.config.load_config import load_config
from megatron.config.local_path import local_path
from megatron.config.model_size import count_parameters, training_flops
from megatron.config.sections.run_config import RunConfig
from megatron.data.prepare.text_files import SUFFIXES, TextFile
from megatron.errors import INTERRUPTED, DataError, EnvironmentSetupError, UserError, os_errors_as
from megatron.io.json_files import read_json_object
from megatron.monitor.metrics_file import METRICS_FILE, read_records
from tools.command_line import tool_parser
from tools.demo_plan import (
    LADDER,
    MEASURED_FIRST,
    TRAINING_SHARE,
    Cost,
    Plan,
    Size,
    choose_size,
    make_plan,
    with_values,
)

ROOT = Path(__file__).resolve().parents[1]
NAME = "demo"
"""Folder of the demo with Python's text, which is what CONFIG names."""
CONFIG = Path("configs/demo.yml")
SHOWN_CHARACTERS = 200
LONGEST_MINUTES = 10_000
NUM_OPENINGS, MOST_OPENING = 3, 60
"""Prompts from a text of the user's own, and the length of each [characters]."""
MOST_MEASURED = 3
"""Sizes that are measured before one is chosen."""
MEASUREMENT: dict[str, Any] = {
    "train_iters": 12, "log_interval": 4, "eval_iters": 0, "save": "null", "sample_prompts": "null",
}  # fmt: skip
"""Keys of the steps by which the machine is measured."""


class DemoError(UserError):
    """A step of the demo ended with an error, which it has printed itself."""


@dataclass(frozen=True)
class Demo:
    """Paths of a demo, as seen from the folder around it."""

    folder: Path

    @property
    def data(self) -> Path:
        """Returns the folder of tokenizer and datasets."""
        return self.folder / "data"

    @property
    def run(self) -> Path:
        """Returns the folder of checkpoints and metrics."""
        return self.folder / "run"

    @property
    def curve(self) -> Path:
        """Returns the picture of the loss."""
        return self.folder / "loss.png"

    @property
    def report(self) -> Path:
        """Returns the report in HTML."""
        return self.folder / "report.html"

    @property
    def samples(self) -> Path:
        """Returns the records of the generated texts."""
        return self.folder / "samples.jsonl"


def main(argv: Sequence[str]) -> int:
    """Runs all steps, then prints a report."""
    parser = tool_parser(__doc__)
    parser.add_argument("--text", type=local_path, help="your own text, .txt or .jsonl, instead of Python's")
    parser.add_argument(
        "--output-dir", type=local_path, help="folder to make (demo, or demo-NAME for the text NAME.txt)"
    )
    parser.add_argument("--minutes", type=minutes, help="time for all of it, for which the model is chosen")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"changes of {CONFIG}")
    args = parser.parse_intermixed_args(argv)
    for word in args.overrides:
        if "=" not in word:
            parser.error(f"{word}: not a key=value; a text is given with --text")
    started = time.monotonic()
    deadline = None if args.minutes is None else started + 60.0 * args.minutes
    text = None if args.text is None else readable_text(args.text)
    output = (args.output_dir or ROOT / default_name(text)).absolute()
    if os.path.lexists(output):
        raise DemoError(
            f"{output} is there already, and stays as it is. Take it away to make this demo anew (`rm -r {output}`), "
            "or make another beside it: --output-dir FOLDER (`make demo OUTPUT=FOLDER`)."
        )
    with building_beside(output) as place:
        demo = Demo(Path(output.name))
        unigram = run_steps(demo, place, text, args.overrides, deadline)
        put_in_place(place / demo.folder, output)
    report(Demo(output), unigram, time.monotonic() - started)
    return 0


def minutes(text: str) -> float:
    """Converts the time for a demo. Raises ArgumentTypeError unless it is a number of at least 1 [min]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1.0 <= value <= LONGEST_MINUTES:
        raise argparse.ArgumentTypeError(f"expected 1 to {LONGEST_MINUTES} minutes, not {text!r}")
    return value


@os_errors_as(DataError, "--text")
def readable_text(path: Path) -> Path:
    """Returns the whole path of a text. Raises DataError where it cannot be read."""
    TextFile(path)
    with path.open("rb"):
        return path.resolve()


def default_name(text: Path | None) -> str:
    """Returns the folder's name: that of Python's text, or one of the user's own."""
    if text is None:
        return NAME
    ending = next(suffix for suffix in SUFFIXES if text.name.endswith(suffix))
    return f"{NAME}-" + re.sub(r"[^\w.-]+", "-", text.name.removesuffix(ending))


@contextmanager
def building_beside(output: Path) -> Iterator[Path]:
    """Yields a new folder beside `output`, which is gone in the end."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f"{output.name}.part-", dir=output.parent))
    except OSError as error:
        raise EnvironmentSetupError(f"{output.parent}: cannot be written ({error.strerror}).") from error
    try:
        yield place
    finally:
        shutil.rmtree(place)


def put_in_place(built: Path, output: Path) -> None:
    """Renames a whole demo. Raises DemoError where another process has made one in the meantime, and keeps both."""
    try:
        built.rename(output)
    except OSError:
        kept = built.rename(output.with_name(f"{built.parent.name}-whole"))
        raise DemoError(f"{output} has appeared in the meantime, and stays as it is; this demo is in {kept}.") from None


def run_steps(
    demo: Demo, place: Path, text: Path | None, overrides: Sequence[str], deadline: float | None = None
) -> float:
    """Runs the commands in the folder `place`, so that all paths are those of the demo when it is in its own place.

    CONFIG names the folder of Python's demo; another folder gets a copy that names itself, and so does a demo with a
    `deadline`, on the clock of `time.monotonic` [s]. Returns the loss of a unigram model of the held-out text [nats per
    token].
    """
    print(f"$ cd {place}")
    root = Path("..") if place.parent == ROOT else ROOT

    def run(script: str, *arguments: str) -> None:
        words = [str(root / script), *arguments]
        shown = shlex.join(["python", *words])
        print(f"\n$ {shown}", flush=True)
        with subprocess.Popen([sys.executable, *words], cwd=place) as command:
            try:
                code = command.wait()
            except KeyboardInterrupt:
                # The terminal has told the command as well, which says so.
                command.wait()
                sys.exit(INTERRUPTED)
        if code != 0:
            raise DemoError(f"`{shown}` ended with exit code {code}; its message is above.")

    run("tools/datasets/prepare_data.py", "--output-dir", str(demo.data), *(["--text", str(text)] if text else []))
    facts = json.loads((place / demo.data / "data.json").read_text())
    config = root / CONFIG
    if demo.folder != Path(NAME) or deadline is not None:
        config = demo.folder / CONFIG.name
        own = (ROOT / CONFIG).read_text().replace(f"{NAME}/", f"{demo.folder}/")
        if text is not None:
            prompts = json.dumps(openings(place / demo.data / "valid.jsonl"), ensure_ascii=False)
            own = with_values(own, {"sample_prompts": prompts})
        (place / config).write_text(own)
    if deadline is not None:
        plan = measured_plan(demo, place, config, overrides, facts, deadline, run)
        reasons = "".join(f"# - {reason}\n" for reason in plan.reasons)
        print("\nchosen for this machine and this text:\n" + reasons.replace("# ", "  "), end="", flush=True)
        own = with_values((place / config).read_text(), plan.keys())
        (place / config).write_text(f"# Chosen for a machine, a text and a time:\n{reasons}{own}")
    run("deepy.py", "train.py", str(config), *overrides)
    unigram: float = facts["valid_unigram_nats_per_token"]
    reference = ["--reference", f"{unigram:.4f}", "unigram model"]
    run("tools/plots/plot_runs.py", str(demo.run), "--output", str(demo.curve), *reference)
    samples = f"sample_output_file={demo.samples}"
    run("deepy.py", "generate.py", str(config), *overrides, f"load={demo.run}", samples)
    run("tools/report.py", str(demo.run), "--output", str(demo.report))
    return unigram


def openings(documents: Path) -> list[str]:
    """Returns the first words of held-out documents, which training continues."""
    texts = (json.loads(line)["text"] for line in documents.read_text(encoding="utf-8").splitlines())
    found = (" ".join(text.split()[:3])[:MOST_OPENING] for text in texts)
    return list(islice(dict.fromkeys(filter(None, found)), NUM_OPENINGS))


def measured_plan(
    demo: Demo,
    place: Path,
    config: Path,
    overrides: Sequence[str],
    facts: Mapping[str, Any],
    deadline: float,
    run: Callable[..., None],
) -> Plan:
    """Chooses a model by a few steps of the demo's, and of the one that these speak for.

    Raises DemoError where the time is too short.
    """
    text_tokens = facts["train_tokens"]

    def loaded(size: Size) -> RunConfig:
        words = [*overrides, *(f"{key}={value}" for key, value in size.keys().items())]
        with contextlib.chdir(place):
            return load_config([config], words).run

    def cost(size: Size) -> Cost:
        model = loaded(size).model
        vocabulary = facts["vocab_size"]
        length = model.seq_length
        return Cost(count_parameters(model, vocabulary), training_flops(model, vocabulary, length))

    costs = {size: cost(size) for size in LADDER}
    sizes, step_seconds, started = [MEASURED_FIRST], 0.0, 0.0
    for size in sizes:
        began = time.monotonic()
        folder = demo.folder / f"measured-{size.hidden_size}x{size.num_layers}"
        keys = {**size.keys(), **MEASUREMENT, "log_dir": str(folder)}
        run("deepy.py", "train.py", str(config), *overrides, *(f"{key}={value}" for key, value in keys.items()))
        rows = read_records(place / folder / METRICS_FILE)
        description = read_json_object(place / folder / "run.json")
        shutil.rmtree(place / folder)
        # The first steps warm up.
        step_seconds = min(row["train/step_seconds"] for row in rows[1:])
        tokens_per_step = description["tokens_per_step"]
        started = time.monotonic() - began - MEASUREMENT["train_iters"] * step_seconds
        # Training, samples, the picture and the report each start once more.
        seconds = TRAINING_SHARE * (deadline - time.monotonic() - 3.0 * started)
        rate = costs[size].flops_per_token * tokens_per_step / step_seconds
        chosen = choose_size(costs, rate, seconds, text_tokens)
        if chosen not in sizes and len(sizes) < MOST_MEASURED:
            sizes.append(chosen)
    try:
        return make_plan(size, costs[size], step_seconds, seconds, text_tokens, tokens_per_step)
    except ValueError as error:
        raise DemoError(f"--minutes: {error}. Give it more minutes.") from error


def report(demo: Demo, unigram: float, seconds: float) -> None:
    """Prints what was learned and where everything lies."""
    records = [json.loads(line) for line in (demo.run / "metrics.jsonl").read_text().splitlines()]
    loss = [record["valid/lm_loss"] for record in records if "valid/lm_loss" in record][-1]
    print("\nThree samples from the trained model:")
    for line in demo.samples.read_text().splitlines()[:3]:
        text = json.loads(line)["text"]
        print("  | " + text[:SHOWN_CHARACTERS].replace("\n", "\n  | "))
    print(f"\nheld-out loss, unigram model   {unigram:.3f} nats per token")
    print(f"held-out loss, TokenFormer     {loss:.3f} nats per token ({unigram - loss:+.3f} better)")
    own = demo.folder / CONFIG.name
    print(f"\ntokenizer and datasets   {demo.data}/\ncheckpoints and metrics  {demo.run}/")
    print(f"loss curve               {demo.curve}\nall samples              {demo.samples}")
    print(f"report, for a browser    {demo.report}")
    print(f"configuration            {own if own.is_file() else ROOT / CONFIG}, for commands in {demo.folder.parent}")
    print(f"took {seconds:.0f} s")


if __name__ == "__main__":
    run_tool(main)
