"""The machines of a hostfile, `NAME slots=N` on each line, and those of them that a run takes."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.config.sections.launch import LaunchConfig
from megatron.errors import ConfigError, os_errors_as

DEFAULT_HOSTFILE = "/job/hostfile"
"""Where NeoX and DeepSpeed look when none is named."""
PLACEHOLDER = "/mock_path"
"""What stands in NeoX's own YAMLs, and means none."""
HOSTFILE_VARIABLE = "DLTS_HOSTFILE"

MOST_SLOTS = 1024
# A name that began with a hyphen would be an option of ssh.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>\d+)")
_CHOICE = re.compile(r"(?P<host>[^:@\s]+)(:(?P<slots>\d+(,\d+)*))?")


@dataclass(frozen=True)
class Node:
    """A machine, and its GPUs, or ranks on a CPU, by number."""

    host: str
    slots: tuple[int, ...]


def find_hostfile(config: LaunchConfig, environment: Mapping[str, str]) -> Path | None:
    """Returns the hostfile: the key's, that of DLTS_HOSTFILE, or /job/hostfile where it exists.

    Says so where it is only the placeholder of NeoX's YAMLs. Raises ConfigError for one that does not exist.
    """
    named = {"hostfile": config.hostfile, HOSTFILE_VARIABLE: environment.get(HOSTFILE_VARIABLE)}
    for name, value in named.items():
        if value == PLACEHOLDER:
            print(f"{name}: {value}: NeoX's YAMLs say so where there is no hostfile", file=sys.stderr)
        elif value:
            if not Path(value).is_file():
                raise ConfigError(
                    f"{name}: {value}: no such file. It lists the machines, one `NAME slots=RANKS` on each line; "
                    "without it, ranks start on this machine alone."
                )
            return Path(value)
    return Path(DEFAULT_HOSTFILE) if Path(DEFAULT_HOSTFILE).is_file() else None


def read_hostfile(path: Path) -> tuple[Node, ...]:
    """Reads the machines, in their order. Raises ConfigError with everything that is wrong, line by line."""
    problems: list[str] = []
    found: dict[str, tuple[int, int]] = {}
    with os_errors_as(ConfigError, str(path)):
        lines = path.read_text("utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        match = _LINE.fullmatch(words)
        place = f"{path}:{number}: {words}"
        if match is None:
            problems.append(f"{place}: expected a name and its ranks, as in `node1 slots=8`")
        elif not _HOST.fullmatch(match["host"]):
            problems.append(
                f"{place}: {match['host']}: expected a name of letters, digits, dots and hyphens; a user or a port "
                "belongs into ~/.ssh/config"
            )
        elif match["host"] in found:
            problems.append(f"{place}: {match['host']} stands on line {found[match['host']][1]} already")
        elif not 1 <= int(match["slots"]) <= MOST_SLOTS:
            problems.append(f"{place}: expected 1 to {MOST_SLOTS} slots")
        else:
            found[match["host"]] = int(match["slots"]), number
    if problems:
        raise ConfigError("\n".join(problems))
    if not found:
        raise ConfigError(f"{path}: no machine is listed; expected lines such as `node1 slots=8`.")
    return tuple(Node(host, tuple(range(slots))) for host, (slots, _) in found.items())


def choose_nodes(nodes: tuple[Node, ...], config: LaunchConfig) -> tuple[Node, ...]:
    """Takes what include, exclude, num_nodes and num_gpus leave of the machines.

    Raises ConfigError where they name what is not there, or leave nothing.
    """
    if config.include is not None:
        nodes = _filtered(nodes, "include", config.include)
    if config.exclude is not None:
        nodes = _filtered(nodes, "exclude", config.exclude)
    if config.num_nodes is not None:
        if config.num_nodes > len(nodes):
            raise ConfigError(f"num_nodes: {config.num_nodes} are asked for, and {len(nodes)} are listed.")
        nodes = nodes[: config.num_nodes]
    if config.num_gpus is not None:
        small = next((node for node in nodes if len(node.slots) < config.num_gpus), None)
        if small is not None:
            raise ConfigError(
                f"num_gpus: {config.num_gpus} ranks on each machine, and {small.host} has {len(small.slots)} slots. "
                "Correct the hostfile, or leave num_gpus out."
            )
        nodes = tuple(replace(node, slots=node.slots[: config.num_gpus]) for node in nodes)
    return nodes


def _filtered(nodes: tuple[Node, ...], key: str, choice: str) -> tuple[Node, ...]:
    """Applies DeepSpeed's `NAME[:SLOT,SLOT...]@NAME...`."""
    known = {node.host: node for node in nodes}
    chosen: dict[str, tuple[int, ...]] = {}
    for word in choice.split("@"):
        match = _CHOICE.fullmatch(word.strip())
        if match is None:
            raise ConfigError(f"{key}: {choice}: expected NAME[:SLOT,SLOT...][@NAME...], as in `node1@node2:0,2`.")
        host = match["host"]
        if host not in known:
            raise ConfigError(f"{key}: {host}: no such machine is listed; these are: {', '.join(known)}.")
        slots = known[host].slots if match["slots"] is None else tuple(map(int, match["slots"].split(",")))
        missing = sorted(set(slots) - set(known[host].slots))
        if missing:
            raise ConfigError(f"{key}: {host} has the slots 0 to {known[host].slots[-1]}, and not {missing[0]}.")
        chosen[host] = tuple(sorted({*slots, *chosen.get(host, ())}))
    if key == "include":
        return tuple(Node(node.host, chosen[node.host]) for node in nodes if node.host in chosen)
    left = [
        Node(node.host, tuple(slot for slot in node.slots if slot not in chosen.get(node.host, ()))) for node in nodes
    ]
    if not any(node.slots for node in left):
        raise ConfigError(f"exclude: {choice}: leaves nothing.")
    return tuple(node for node in left if node.slots)
