"""Writes what runs have done into one HTML file, which needs no network; or serves it, and follows them.

    python tools/report.py runs/a
    python tools/report.py runs/a runs/b --output report.html --x tokens --smooth 25
    python tools/report.py runs/a --live 8080

RUN is a run's folder. The page has what was run and how the runs differ, curves with zoom and smoothing, where the time
went, samples, scores of eval.py, a verdict on growth, events, and the checkpoints on disk. What is damaged is left out
and named, there and on standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tokenformer import run_tool

from megatron.config.local_path import local_path
from megatron.errors import EnvironmentSetupError, os_errors_as
from megatron.io.durable import atomic_write
from tools.command_line import positive, tool_parser

if TYPE_CHECKING:
    from megatron.report.page import Page

X_AXES = ("steps", "tokens", "flops")
RESULTS = Path("eval_results")


def main(argv: Sequence[str]) -> int:
    """Writes the report and prints its path, or serves it until Ctrl-C."""
    args = parse_args(argv)
    # plotly takes a second to import, and --help needs none of this.
    from megatron.report.page import build_page
    from megatron.report.run_files import changed_at, read_runs

    def build() -> Page:
        return build_page(read_runs(args.runs, args.results), args.x, args.smooth)

    if args.live is not None:
        return serve(build, lambda: changed_at([*args.runs, *args.results]), args.live)
    page = build()
    for problem in page.problems:
        print(f"warning: {problem}", file=sys.stderr)
    with os_errors_as(EnvironmentSetupError, "--output"):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.output) as temporary:
            temporary.write_text(page.html(), encoding="utf-8")
    print(f"{args.output}: {len(args.runs)} run(s)")
    return 0


def serve(build: Callable[[], Page], state: Callable[[], object], port: int) -> int:
    """Serves the page until Ctrl-C, and says where."""
    from megatron.report.live_page import LivePage, open_server

    live = LivePage(build, state)
    live.page()  # what cannot be read at all is said here, not in the browser
    with open_server(live, port) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/ follows the run(s); Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = tool_parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=local_path, metavar="RUN", help="a run's folder (log_dir, or else save)"
    )
    parser.add_argument("--output", type=local_path, default=Path("report.html"), help="file to write (report.html)")
    parser.add_argument("--x", choices=X_AXES, default="steps", help="horizontal axis to begin with (steps)")
    parser.add_argument("--smooth", type=positive, default=1, metavar="N", help="begin with the mean of N rows")
    parser.add_argument(
        "--results",
        nargs="+",
        type=local_path,
        default=[RESULTS] if RESULTS.is_dir() else [],
        help="files of eval.py, or folders of them (eval_results, where there is one)",
    )
    parser.add_argument(
        "--live", type=port_number, metavar="PORT", help="serve it on 127.0.0.1, and follow; 0: any port"
    )
    return parser.parse_args(argv)


def port_number(text: str) -> int:
    """Converts an argument that is a port, or 0. Raises ArgumentTypeError for anything else."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port, 0 to 65535, not {text!r}")
    return int(text)


if __name__ == "__main__":
    run_tool(main)
