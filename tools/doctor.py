"""Says what this machine, or all ranks of a launcher, can do, what is missing and how to get it.

    python tools/doctor.py [--folder runs]
    torchrun --nproc-per-node 8 tools/doctor.py          # or under srun, or mpirun, as train.py is started

Looks at versions, devices, compilers, fast paths, disk and memory of every machine, and measures an all-reduce and
transfers between the ranks. Ends with 1 where something keeps runs from working; what only costs speed is no error.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tokenformer import run_tool

from megatron.config.local_path import local_path
from tools.command_line import tool_parser

if TYPE_CHECKING:
    from tools.doctor_machine import Finding

MARKS = {"ok": "ok     ", "absent": "missing", "wrong": "WRONG  "}
LIMIT = timedelta(minutes=3)
"""Time for ranks to meet, and for each exchange between them."""


def main(argv: Sequence[str]) -> int:
    """Looks at the machines, prints the report on rank 0, and returns 1 where something is wrong."""
    args = parse_args(argv)
    from megatron.launch.environment import prepare_environment

    prepare_environment()
    from megatron.mpu.agreement import gather_objects, rank_and_size
    from megatron.mpu.process_group import process_group
    from tools.doctor_machine import machine_findings
    from tools.doctor_ranks import rank_findings

    host = socket.gethostname()
    with process_group(LIMIT):
        examined = machine_findings(args.folder) if os.environ["LOCAL_RANK"] == "0" else None
        machines = {host: found for host, found in gather_objects((host, examined)) if found is not None}
        ranks = rank_findings(host)
        rank, _ = rank_and_size()
    if rank == 0:
        print(as_json(machines, ranks) if args.json else as_text(machines, ranks))
    everything = [*ranks, *(finding for found in machines.values() for finding in found)]
    return int(any(finding.kind == "wrong" for finding in everything))


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = tool_parser(__doc__)
    parser.add_argument("--folder", type=local_path, default=Path("runs"), help="where runs are to be saved (runs)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    return parser.parse_args(argv)


def as_text(machines: dict[str, list[Finding]], ranks: list[Finding]) -> str:
    """Lays the report out by topic; machines with the same findings share theirs."""
    alike: dict[tuple[Finding, ...], list[str]] = {}
    for host, found in machines.items():
        alike.setdefault(tuple(found), []).append(host)
    lines = []
    for findings, hosts in [*alike.items(), (tuple(ranks), [])]:
        if hosts:
            lines.append(f"{', '.join(hosts)}")
        for finding in findings:
            remedy = f"\n{'':23}-> {finding.remedy}" if finding.remedy else ""
            lines.append(f"  {finding.topic:<11}{MARKS[finding.kind]}  {finding.text}{remedy}")
    return "\n".join(lines)


def as_json(machines: dict[str, list[Finding]], ranks: list[Finding]) -> str:
    """Returns the report as JSON."""
    by_host = {host: [asdict(finding) for finding in found] for host, found in machines.items()}
    return json.dumps({"machines": by_host, "ranks": [asdict(finding) for finding in ranks]}, indent=1)


if __name__ == "__main__":
    run_tool(main)
