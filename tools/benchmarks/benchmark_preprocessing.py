"""Compares preprocess_data.py with a plain pipeline in the manner of NeoX's: MB/s of text, and peak memory.

    python tools/benchmarks/benchmark_preprocessing.py --megabytes 200 --output preprocessing.json

Both tokenize the same text on this machine, with 1 and 2 workers, and must write the same bytes. The text is sources
and documents of the installed packages and of Python, each content once: a repetition would be found in the tokenizer's
cache. The tokenizer is a byte-level BPE of 50,000 tokens that is trained on a part of it, or --tokenizer. The ceiling
is `encode_batch_fast` of the tokenizers library alone, on one core. Processor seconds tell more than the clock where
others use the machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_tokenformer import run_tool

import tokenizers

from megatron.config.local_path import local_path
from megatron.io.hashing import file_sha256
from tools.benchmarks.benchmark_command import write_report
from tools.command_line import positive, tool_parser
from tools.datasets.prepare_data import train_tokenizer

ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cpp", ".cuh", ".c", ".js", ".json", ".html")
SHORTEST = 200  # bytes of a file
LONGEST = 1_000_000
TRAINING_BYTES = 30_000_000
CEILING_BYTES = 10_000_000
ROOT = Path(__file__).resolve().parents[2]
WORKERS = (1, 2)


def main(argv: Sequence[str]) -> int:
    """Measures, prints the table, and writes the JSON file."""
    parser = tool_parser(__doc__)
    parser.add_argument("--megabytes", type=positive, default=200, help="of text (200)")
    parser.add_argument("--vocab-size", type=positive, default=50_000, help="tokens of the tokenizer (50,000)")
    parser.add_argument("--tokenizer", type=local_path, help="tokenizer.json to use instead of training one")
    parser.add_argument("--rounds", type=positive, default=1, help="timed rounds; the fastest counts (1)")
    parser.add_argument("--output", type=local_path, help="JSON file to write")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        report = measure(Path(folder), args.megabytes, args.vocab_size, args.tokenizer, args.rounds)
    print(table(report))
    write_report(report, args.output)
    return 0


def measure(folder: Path, megabytes: int, vocab_size: int, tokenizer: Path | None, rounds: int) -> dict[str, Any]:
    """Runs both pipelines on the text, and ours on a quarter of it for its memory. Returns the report."""
    corpus, part = folder / "corpus.jsonl", folder / "part.jsonl"
    size, documents = write_corpus(corpus, megabytes * 1_000_000)
    write_corpus(part, size // 4)
    if tokenizer is None:
        tokenizer = folder / "tokenizer.json"
        train_tokenizer(first_texts(corpus, TRAINING_BYTES), vocab_size, tokenizer)
    report: dict[str, Any] = {
        "text_bytes": size,
        "documents": documents,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "tokenizers": tokenizers.__version__,
        "ceiling": ceiling(corpus, tokenizer),
        "runs": [],
    }
    hashes = set()
    for round_ in range(rounds):
        for workers in WORKERS:
            for name in ("plain", "tokenizers", "auto"):
                prefix = folder / f"{name}{workers}{round_}"
                run = timed(command(name, corpus, tokenizer, prefix, workers))
                report["runs"].append({"name": name, "workers": workers, "text_bytes": size} | run)
                output = prefix if name == "plain" else prefix.with_name(f"{prefix.name}_text_document")
                hashes.add(tuple(file_sha256(output.with_name(output.name + end)) for end in (".bin", ".idx")))
    if len(hashes) > 1:
        raise AssertionError("the pipelines have written different bytes")
    run = timed(command("auto", part, tokenizer, folder / "quarter", 2))
    report["runs"].append({"name": "auto, a quarter of the text", "workers": 2, "text_bytes": size // 4} | run)
    return report


def write_corpus(path: Path, size: int) -> tuple[int, int]:
    """Writes about `size` bytes of text as JSON lines; returns the bytes and the documents."""
    written = documents = 0
    with path.open("w", encoding="utf-8") as file:
        for text in distinct_texts():
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            documents += 1
            if written >= size:
                break
    return written, documents


def distinct_texts() -> Iterator[str]:
    """Yields the content of text files of the installation, each once, in an order that is drawn once for all."""
    folders = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    files = sorted({file for folder in folders for file in folder.rglob("*") if file.suffix in ENDINGS})
    random.Random(0).shuffle(files)  # noqa: S311 - no secret
    seen = set()
    for file in files:
        try:
            content = file.read_bytes()
            text = content.decode()
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(content).digest()
        if SHORTEST <= len(content) <= LONGEST and digest not in seen:
            seen.add(digest)
            yield text


def first_texts(corpus: Path, size: int) -> Iterator[str]:
    """Yields the first texts of a corpus, of `size` bytes together."""
    taken = 0
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)["text"]
            yield text
            taken += len(text.encode())
            if taken >= size:
                return


def ceiling(corpus: Path, tokenizer: Path) -> dict[str, float]:
    """Times `encode_batch_fast` alone, on one core: MB of text per processor second."""
    words = [sys.executable, "-c", CEILING, str(tokenizer), str(corpus), str(CEILING_BYTES)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    told = subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout
    size, seconds = map(float, told.split())
    return {"text_bytes": size, "processor_seconds": seconds, "mb_per_processor_second": size / seconds / 1e6}


CEILING = """
import json, sys, time, tokenizers
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
texts, size = [], 0
for line in open(sys.argv[2], encoding="utf-8"):
    texts.append(json.loads(line)["text"])
    size += len(texts[-1].encode())
    if size >= int(sys.argv[3]):
        break
started = time.process_time()
for first in range(0, len(texts), 100):
    tokenizer.encode_batch_fast(texts[first:first + 100])
print(size, time.process_time() - started)
"""


def command(name: str, corpus: Path, tokenizer: Path, prefix: Path, workers: int) -> list[str]:
    """Returns the command line of a contender: `plain`, or ours with an encoder."""
    if name == "plain":
        script = "tools/benchmarks/plain_preprocessing.py"
        return [sys.executable, str(ROOT / script), str(corpus), str(tokenizer), str(prefix), str(workers)]
    words = ["--input", str(corpus), "--output-prefix", str(prefix), "--append-eod", "--workers", str(workers)]
    words += ["--tokenizer-type", "HFTokenizer", "--vocab-file", str(tokenizer), "--encoder", name]
    return [sys.executable, str(ROOT / "tools/datasets/preprocess_data.py"), *words]


def timed(words: Sequence[str]) -> dict[str, float]:
    """Runs a command; returns seconds by the clock and of the processor, and the peak memory of its processes [MB]."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        peaks = [0.0]
        thread = threading.Thread(target=watch_memory, args=(process.pid, peaks), daemon=True)
        thread.start()
        _, said = process.communicate()
    seconds = time.perf_counter() - started
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {said}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "processor_seconds": used, "peak_mb": max(peaks)}


def watch_memory(pid: int, peaks: list[float]) -> None:
    """Notes the memory of a process and its children, shared pages divided among them (PSS), until it ends."""
    while True:
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            peaks.append(sum(map(proportional_set, [str(pid), *children])))
        except OSError:
            return
        time.sleep(0.1)


def proportional_set(pid: str) -> float:
    """Returns the proportional set size of a process [MB]; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1000


def table(report: dict[str, Any]) -> str:
    """Formats the report: MB/s by the clock and of the processor, and the ratio to the plain pipeline."""
    fastest: dict[tuple[str, int], dict[str, Any]] = {}
    for run in report["runs"]:
        key = run["name"], run["workers"]
        if key not in fastest or run["seconds"] < fastest[key]["seconds"]:
            fastest[key] = run
    ceiling_ = report["ceiling"]["mb_per_processor_second"]
    lines = [
        f"{report['text_bytes'] / 1e6:,.0f} MB of text in {report['documents']:,} documents, {report['cores']} cores, "
        f"load {report['load']:.1f} at the start; tokenizers {report['tokenizers']}",
        f"encode_batch_fast alone: {ceiling_:.2f} MB per processor second",
        "",
        f"{'':30}{'workers':>8}{'MB/s':>8}{'times plain':>13}{'MB/processor s':>16}{'of ceiling':>12}{'peak MB':>9}",
    ]
    for (name, workers), run in fastest.items():
        megabytes = run["text_bytes"] / 1e6
        plain = fastest["plain", workers]
        speed, by_processor = megabytes / run["seconds"], megabytes / run["processor_seconds"]
        ratio = speed / (plain["text_bytes"] / 1e6 / plain["seconds"])
        lines.append(
            f"{name:30}{workers:>8}{speed:>8.2f}{ratio:>13.2f}{by_processor:>16.2f}{by_processor / ceiling_:>12.0%}"
            f"{run['peak_mb']:>9.0f}"
        )
    flat = [run["peak_mb"] for run in report["runs"] if run["name"].startswith("auto") and run["workers"] == 2]
    lines += ["", f"peak memory of ours, whole text over a quarter: {statistics.mean(flat[:-1]) / flat[-1]:.2f}"]
    return "\n".join(lines)


if __name__ == "__main__":
    run_tool(main)
