"""Does the main job in one go: real text, tokenizer, dataset, training, evaluation, loss curve, samples.

    python tools/demo.py
    python tools/demo.py --text mine.txt train_iters=1000

Every step is a command that a user could type, and is printed before it runs. Everything is built in a folder beside
the demo's, and put in its place when it is whole: demo/, or demo-mine/ for the text mine.txt. A folder that is there
already is left as it is, for it may hold what took long to train.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_tokenformer import run_tool

from megatron.config.local_path import local_path
from megatron.data.prepare.text_files import SUFFIXES, TextFile
from megatron.errors import INTERRUPTED, DataError, EnvironmentSetupError, UserError, os_errors_as
from tools.command_line import tool_parser

ROOT = Path(__file__).resolve().parents[1]
NAME = "demo"
"""Folder of the demo with Python's text, which is what CONFIG names."""
CONFIG = Path("configs/demo.yml")
SHOWN_CHARACTERS = 200


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
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"changes of {CONFIG}")
    args = parser.parse_intermixed_args(argv)
    for word in args.overrides:
        if "=" not in word:
            parser.error(f"{word}: not a key=value; a text is given with --text")
    started = time.monotonic()
    text = None if args.text is None else readable_text(args.text)
    output = (args.output_dir or ROOT / default_name(text)).absolute()
    if os.path.lexists(output):
        raise DemoError(
            f"{output} is there already, and stays as it is. Take it away to make this demo anew (`rm -r {output}`), "
            "or make another beside it: --output-dir FOLDER (`make demo OUTPUT=FOLDER`)."
        )
    with building_beside(output) as place:
        demo = Demo(Path(output.name))
        unigram = run_steps(demo, place, text, args.overrides)
        put_in_place(place / demo.folder, output)
    report(Demo(output), unigram, time.monotonic() - started)
    return 0


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


def run_steps(demo: Demo, place: Path, text: Path | None, overrides: Sequence[str]) -> float:
    """Runs the commands in the folder `place`, so that all paths are those of the demo when it is in its own place.

    CONFIG names the folder of Python's demo; another folder gets a copy that names itself. Returns the loss of a
    unigram model of the held-out text [nats per token].
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
    config = root / CONFIG
    if demo.folder != Path(NAME):
        config = demo.folder / CONFIG.name
        (place / config).write_text((ROOT / CONFIG).read_text().replace(f"{NAME}/", f"{demo.folder}/"))
    run("deepy.py", "train.py", str(config), *overrides)
    unigram: float = json.loads((place / demo.data / "data.json").read_text())["valid_unigram_nats_per_token"]
    reference = ["--reference", f"{unigram:.4f}", "unigram model"]
    run("tools/plots/plot_runs.py", str(demo.run), "--output", str(demo.curve), *reference)
    samples = f"sample_output_file={demo.samples}"
    run("deepy.py", "generate.py", str(config), *overrides, f"load={demo.run}", samples)
    return unigram


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
    print(f"configuration            {own if own.is_file() else ROOT / CONFIG}, for commands in {demo.folder.parent}")
    print(f"took {seconds:.0f} s")


if __name__ == "__main__":
    run_tool(main)
