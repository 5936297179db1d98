"""What every launcher must do, shown by runs of deepy.py: train, fail, stop, and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import yaml

from tests.helpers.configs import TOKENFORMER, write_dataset
from tests.helpers.forkserver import ROOT
from tests.helpers.records import records

STEPS = 10
NOT_RUN = 3
"""Exit code of a check that this machine cannot run."""
TOLERANCE = 1e-5
"""Difference of losses between one process and two pipeline stages."""
SECRET = "hunter2-must-not-travel"  # noqa: S105 - a planted one
ORPHAN_SECONDS = 20.0
LONGEST_OUTPUT = 4000

LENGTH = 5000
RAISES = f"""
import os, time
from megatron.errors import exit_on_user_error

def main():
    print("rank", os.environ["RANK"], "begins")
    time.sleep(1)
    if os.environ["RANK"] == "1":
        raise ValueError("x" * {LENGTH} + " boom of rank 1")
    time.sleep(600)

exit_on_user_error(main)
"""
"""A script of which rank 1 fails, with more to say than srun and mpirun pass on in one piece."""


class CheckError(Exception):
    """A launcher did not do what it must."""


def require_programs(packages: Mapping[str, str], *, root: bool = False) -> None:
    """Ends this process with a sentence where a program, given with its Debian package, or root is missing."""
    folders = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = [package for program, package in packages.items() if shutil.which(program, path=folders) is None]
    if missing:
        print(f"not run: missing packages. Install them with `apt-get install {' '.join(dict.fromkeys(missing))}`.")
        sys.exit(NOT_RUN)
    if root and os.getuid() != 0:
        print("not run: the daemons here need root")
        sys.exit(NOT_RUN)


@contextlib.contextmanager
def daemon(*command: str, log: Path, environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a daemon in the foreground for as long as the body runs."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Runs:
    """A folder of runs of a tiny model, and what one process has trained."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "a folder; of runs"
        self.work.mkdir()
        write_dataset(folder / "text_document")
        keys = TOKENFORMER | {"data_path": str(folder / "text_document"), "index_cache_dir": str(folder / "index")}
        keys |= {"train_iters": STEPS, "eval_iters": 0, "checkpoint_factor": 1000}
        (self.work / "tiny model.yml").write_text(yaml.safe_dump(keys))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "PMI"))},
            **{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WANDB_API_KEY": SECRET, "NCCL_PASSWORD": SECRET},
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools" / "start")]),
        }
        finished = self.run("alone", ["launcher=local", "num_gpus=1"])
        if finished.returncode != 0:
            raise CheckError(finished.stderr)
        self.losses = self.losses_of("alone")

    def command(
        self, name: str, words: Sequence[str], *, script: Sequence[str] = ("deepy.py", "train.py")
    ) -> list[str]:
        """Returns the command of a run whose folder is `name`."""
        own = ["tiny model.yml", f"save={self.work / name}", *words]
        return [sys.executable, *(str(ROOT / word) for word in script), *own]

    def start(
        self, command: Sequence[str], output: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a command in the folder of runs."""
        with output.open("wb") as file:
            return subprocess.Popen(
                command,
                cwd=self.work,
                env={**self.environment, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(
        self, name: str, words: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs deepy.py to its end."""
        return subprocess.run(
            self.command(name, words),
            cwd=self.work,
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )

    def losses_of(self, name: str) -> list[float]:
        """Reads the losses of a run."""
        return records(self.work / name, "train/lm_loss")

    def processes(self) -> list[psutil.Process]:
        """Lists the processes that work in the folder of runs, wherever they were started from."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if Path(process.cwd()) == self.work and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """Lists the ranks, in the order of their numbers."""
        found: dict[int, psutil.Process] = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                rank = process.environ().get("RANK")
                if rank is not None and str(ROOT / "train.py") == process.cmdline()[1]:
                    found[int(rank)] = process
        return [found[rank] for rank in sorted(found)]

    def wait_for_nobody(self) -> None:
        """Fails when processes of the run are still there after a while."""
        deadline = time.monotonic() + ORPHAN_SECONDS
        while self.processes():
            if time.monotonic() > deadline:
                left = [" ".join(process.cmdline()) for process in self.processes()]
                for process in self.processes():
                    process.kill()
                raise CheckError(f"processes are left: {left}")
            time.sleep(0.1)


class LauncherCheck:
    """The checks of one launcher, each a run of two ranks."""

    def __init__(
        self, runs: Runs, name: str, words: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self.runs = runs
        self.name = name
        self.words = [*words, "pipe_parallel_size=2"]
        self.environment = environment

    def all(self) -> None:
        """Runs them all."""
        self.dry_run()
        self.trains()
        self.a_killed_rank_is_named()
        self.an_error_comes_last()
        self.a_signal_saves()
        self.a_killed_launcher_leaves_nobody()

    def passed(self, what: str, begin: float) -> None:
        """Prints that a check has passed."""
        self.runs.wait_for_nobody()
        print(f"{self.name}: {what} ({time.monotonic() - begin:.0f} s)", flush=True)

    def dry_run(self) -> None:
        """Shows what would be started, and starts nothing."""
        begin = time.monotonic()
        finished = self.runs.run("dry", [*self.words, "--dry-run"], self.environment)
        expect(finished.returncode == 0 and SECRET not in finished.stdout, finished.stdout + finished.stderr)
        expect(not (self.runs.work / "dry").exists(), "a dry run has made a folder")
        print("\n".join(line[:300] for line in finished.stdout.splitlines()))
        self.passed("--dry-run prints the commands, without a secret, and starts nothing", begin)

    def trains(self) -> None:
        """Trains with two pipeline stages what one process trains."""
        begin = time.monotonic()
        finished = self.runs.run(self.name, self.words, self.environment)
        expect(finished.returncode == 0, finished.stdout + finished.stderr)
        self.compare(self.name)
        self.passed(f"{STEPS} steps at PP=2, losses of one process within {TOLERANCE:g}", begin)

    def compare(self, run: str) -> None:
        """Holds the losses of a run against those of one process."""
        found, want = self.runs.losses_of(run), self.runs.losses
        expect(len(found) == len(want) == STEPS, f"{len(found)} steps")
        worst = max(abs(one - other) for one, other in zip(found, want, strict=True))
        expect(worst < TOLERANCE, f"losses differ by {worst}")

    def endless(self, name: str, *words: str) -> tuple[subprocess.Popen[bytes], Path]:
        """Starts a run without end, and returns when it has taken steps."""
        output = self.runs.folder / f"{self.name} {name}.log"
        run = f"{self.name} {name}"
        endless = ["train_iters=1000000", "lr_decay_iters=1000000", *words]
        process = self.runs.start(self.runs.command(run, [*self.words, *endless]), output, self.environment)
        deadline = time.monotonic() + 240
        metrics = self.runs.work / run / "metrics.jsonl"
        while not metrics.exists() or len(self.runs.losses_of(run)) < 3:
            expect(process.poll() is None and time.monotonic() < deadline, output.read_text())
            time.sleep(0.2)
        self.expect_no_secret()
        return process, output

    def expect_no_secret(self) -> None:
        """Fails where the arguments of any process of the run hold the secret of the environment."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                expect(SECRET not in " ".join(process.cmdline()), f"a secret in the arguments of {process}")

    def a_killed_rank_is_named(self) -> None:
        """Kills a rank: the run ends with its name, its code, and without the others."""
        begin = time.monotonic()
        process, output = self.endless("killed")
        ranks = self.runs.ranks()
        expect(len(ranks) == 2, f"{ranks}")
        ranks[1].send_signal(signal.SIGKILL)
        code = process.wait(90)
        text = output.read_text(errors="replace")
        last = text.strip().splitlines()[-1]
        expect(bool(re.fullmatch(r"rank 1 on host \S+ was killed by signal 9 \(SIGKILL\)", last)), text)
        expect(code == 137, f"exit code {code}")
        self.passed(f"a rank killed: exit code 137, last line '{last}'", begin)

    def an_error_comes_last(self) -> None:
        """Makes one rank raise: its traceback is the end of the output, whole, whatever it came through."""
        begin = time.monotonic()
        script = self.runs.work / "raises.py"
        script.write_text(RAISES)
        command = self.runs.command("raises", self.words, script=("deepy.py", str(script)))
        output = self.runs.folder / f"{self.name} raises.log"
        code = self.runs.start(command, output, self.environment).wait(120)
        text = output.read_text(errors="replace").strip()
        start = re.search(r"^rank 1 on host \S+ ended with exit code 1:\nTraceback ", text, re.MULTILINE)
        expect(code == 1 and start is not None, f"exit code {code}: {text}")
        expect(text.endswith(f"ValueError: {'x' * LENGTH} boom of rank 1"), text)
        self.passed("a rank raises: exit code 1, its traceback comes last", begin)

    def a_signal_saves(self) -> None:
        """Sends SIGTERM to deepy.py alone: the run saves and ends with 75."""
        begin = time.monotonic()
        process, output = self.endless("stopped")
        process.send_signal(signal.SIGTERM)
        code = process.wait(90)
        text = output.read_text(errors="replace")
        expect(code == 75, f"exit code {code}: {text}")
        expect(any((self.runs.work / f"{self.name} stopped").glob("global_step*")), text)
        self.passed("SIGTERM: saved, exit code 75", begin)

    def a_killed_launcher_leaves_nobody(self) -> None:
        """Sends SIGKILL to deepy.py: its ranks end."""
        begin = time.monotonic()
        process, _ = self.endless("orphaned", "termination_grace_seconds=5")
        process.kill()
        process.wait()
        self.passed("deepy.py killed: no process is left", begin)


def expect(holds: bool, otherwise: str) -> None:
    """Raises CheckError with what was seen where a condition does not hold."""
    if not holds:
        raise CheckError(otherwise[-LONGEST_OUTPUT:])


@contextlib.contextmanager
def runs_in_temporary_folder() -> Iterator[Runs]:
    """Makes a folder of runs, and removes it with all that is in it."""
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder:
        runs = Runs(Path(folder))
        try:
            yield runs
        finally:
            for process in runs.processes():
                with contextlib.suppress(psutil.Error):
                    process.kill()
