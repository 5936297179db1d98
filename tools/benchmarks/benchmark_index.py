"""Times the index of a corpus of the Pile's size, beside the two shuffles that it consists of, and its peak memory.

    python tools/benchmarks/benchmark_index.py
    python tools/benchmarks/benchmark_index.py --documents 2_100_000 --samples 1_460_000

Lengths of documents are drawn from a log-normal distribution. The shuffles are `RandomState.shuffle` of as many
document and sample numbers, which NeoX's order prescribes. Seconds are given by the clock, and of the processor, which
others on the machine change less.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_tokenformer import run_tool

import numpy as np

from megatron.config.local_path import local_path
from megatron.data.order.index_cache import cached_sample_index
from tools.benchmarks.benchmark_command import write_report
from tools.command_line import tool_parser

SEQ_LENGTH = 2048
SEED = 1234


def main(argv: Sequence[str]) -> int:
    """Measures, prints the table, and writes the JSON file."""
    parser = tool_parser(__doc__)
    parser.add_argument("--documents", type=int, default=210_000_000, help="documents (210,000,000)")
    parser.add_argument("--samples", type=int, default=146_000_000, help="samples of 2,048 tokens (146,000,000)")
    parser.add_argument(
        "--folder", type=local_path, default=Path(), help="where to write (default: the current folder)"
    )
    parser.add_argument("--output", type=local_path, help="JSON file to write")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.folder) as folder:
        report = measure(args.documents, args.samples, Path(folder))
    print(json.dumps(report, indent=1))

    def ratio(of: str) -> float:
        return float(report["build"][of] / report["shuffles"][of])

    print(
        f"the index takes {ratio('clock'):.2f} times its shuffles ({ratio('processor'):.2f} times in processor time), "
        f"and {report['peak_gb']:.1f} GB"
    )
    write_report(report, args.output)
    return 0


def measure(documents: int, samples: int, folder: Path) -> dict[str, Any]:
    """Builds, reads and compares, and maps the index; returns seconds of each and the peak memory [GB]."""
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(6.2, 1.3, documents).astype(np.int32)
    # One epoch is to hold the samples, and not one more.
    lengths = np.maximum((lengths * (samples * SEQ_LENGTH / lengths.sum(dtype=np.int64))).astype(np.int32), 1)
    lengths[0] += max(samples * SEQ_LENGTH + 1 - int(lengths.sum(dtype=np.int64)), 0)
    request = (lengths, range(documents), samples, SEQ_LENGTH, SEED)
    key = ""

    def build() -> None:
        nonlocal key
        _, key = cached_sample_index(*request, folder=folder, name="corpus")

    report = {"documents": documents, "samples": samples, "shuffles": seconds_of(lambda: shuffle(documents, samples))}
    report |= {"build": seconds_of(build), "first start": seconds_of(build)}
    report["other ranks"] = seconds_of(
        lambda: cached_sample_index(*request, folder=folder, name="corpus", checked_key=key)
    )
    return report | {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def shuffle(documents: int, samples: int) -> None:
    """Shuffles as many numbers as the index has."""
    generator = np.random.RandomState(SEED)
    generator.shuffle(np.arange(documents, dtype=np.int32))
    generator.shuffle(np.arange(samples, dtype=np.uint32))


def seconds_of(work: Callable[[], object]) -> dict[str, float]:
    """Returns the seconds that the work takes by the clock, and of the processor, all threads together."""
    started, used = time.perf_counter(), time.process_time()
    work()
    return {"clock": time.perf_counter() - started, "processor": time.process_time() - used}


if __name__ == "__main__":
    run_tool(main)
