"""Hostfiles: what is wrong is named line by line, and keys choose among the machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.config.sections.launch import LaunchConfig
from megatron.errors import ConfigError
from megatron.launch.hostfile import Node, choose_nodes, find_hostfile, read_hostfile

NODES = (Node("a", (0, 1, 2, 3)), Node("b", (0, 1, 2, 3)), Node("c", (0, 1)))


def test_names_and_slots(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# the rack\n\nnode-1.cluster slots=2  # new\nnode2\tslots=1\n")
    assert read_hostfile(path) == (Node("node-1.cluster", (0, 1)), Node("node2", (0,)))


def test_everything_that_is_wrong_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("a slots=2\nb\n\na slots=2\n-oProxyCommand=x slots=1\nme@c slots=1\nd slots=0\ne slots=two\n")
    with pytest.raises(ConfigError) as refused:
        read_hostfile(path)
    assert [line.removeprefix(f"{path}:")[:1] for line in str(refused.value).splitlines()] == list("245678")
    for words in ("b: expected a name and its ranks, as in `node1 slots=8`", "a stands on line 1 already"):
        assert words in str(refused.value)


def test_an_empty_file_and_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# nobody\n")
    with pytest.raises(ConfigError, match="no machine is listed"):
        read_hostfile(tmp_path / "hosts")
    with pytest.raises(ConfigError, match=r"hostfile: .*missing: no such file. It lists the machines"):
        find_hostfile(LaunchConfig(hostfile=str(tmp_path / "missing")), {})
    with pytest.raises(ConfigError, match=r"DLTS_HOSTFILE: .*missing: no such file"):
        find_hostfile(LaunchConfig(), {"DLTS_HOSTFILE": str(tmp_path / "missing")})


def test_the_key_comes_before_the_variable(tmp_path: Path) -> None:
    for name in ("key", "variable"):
        (tmp_path / name).touch()
    variable = {"DLTS_HOSTFILE": str(tmp_path / "variable")}
    assert find_hostfile(LaunchConfig(hostfile=str(tmp_path / "key")), variable) == tmp_path / "key"
    assert find_hostfile(LaunchConfig(), variable) == tmp_path / "variable"
    assert find_hostfile(LaunchConfig(), {}) is None


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ({}, {"a": 4, "b": 4, "c": 2}),
        ({"num_nodes": 2}, {"a": 4, "b": 4}),
        ({"num_gpus": 2}, {"a": 2, "b": 2, "c": 2}),
        ({"include": "c@b:1,3"}, {"b": (1, 3), "c": 2}),
        ({"exclude": "a@b:0"}, {"b": (1, 2, 3), "c": 2}),
        ({"exclude": "a:0,1,2,3", "num_nodes": 1}, {"b": 4}),
    ],
)
def test_keys_choose(keys: dict[str, Any], want: dict[str, Any]) -> None:
    chosen = {node.host: node.slots for node in choose_nodes(NODES, LaunchConfig(**keys))}
    assert chosen == {host: slots if isinstance(slots, tuple) else tuple(range(slots)) for host, slots in want.items()}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_nodes": 4}, "num_nodes: 4 are asked for, and 3 are listed"),
        ({"num_gpus": 3}, "num_gpus: 3 ranks on each machine, and c has 2 slots"),
        ({"include": "d"}, "include: d: no such machine is listed; these are: a, b, c"),
        ({"include": "c:5"}, "include: c has the slots 0 to 1, and not 5"),
        ({"include": "a:x"}, "include: a:x: expected NAME"),
        ({"exclude": "a@b@c"}, "exclude: a@b@c: leaves nothing"),
    ],
)
def test_what_is_not_there_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        choose_nodes(NODES, LaunchConfig(**keys))
    assert words in str(refused.value)
