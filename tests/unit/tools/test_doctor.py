"""The doctor's findings on a machine: what is missing is named with its remedy, and what is wrong ends with 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.errors import EnvironmentSetupError
from megatron.training.stability import deepspeed_version
from tests.helpers.commands import run_command
from tools import doctor_machine
from tools.doctor import as_json, as_text
from tools.doctor_machine import Finding, machine_findings


def found(topic: str, folder: Path) -> list[Finding]:
    return [finding for finding in machine_findings(folder) if finding.topic == topic]


def test_one_machine_by_the_users_command(tmp_path: Path) -> None:
    done = run_command(["tools/doctor.py", "--folder", str(tmp_path / "runs")])
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("versions   ok       Python 3", "fast paths ok       pattention: eager"):
        assert line in done.stdout
    assert f"disk       ok       {tmp_path}: " in done.stdout and " MB/s" in done.stdout
    assert "ranks      ok       1 ranks on 1 machine, backend gloo" in done.stdout
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_a_compiler_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert Finding(
        "compilers", "absent", "no no-such-compiler; torch_compile needs it on a CPU", "apt-get install gcc g++"
    ) in found("compilers", tmp_path)


def test_packages_that_are_missing_or_not_the_tested_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor_machine.version
    others = {"numpy": "1.0.0"}

    def version(name: str) -> str:
        if name == "einops":
            raise doctor_machine.PackageNotFoundError(name)
        return others.get(name) or real(name)

    monkeypatch.setattr(doctor_machine, "version", version)
    kinds = {finding.text: finding.kind for finding in found("versions", tmp_path)}
    assert kinds["einops is not installed"] == "wrong"
    [other] = [text for text in kinds if text.startswith("not the tested set")]
    assert "numpy 1.0.0 (tested: " in other and kinds[other] == "absent"


def test_a_deepspeed_that_computes_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_version, "version", lambda name: "0.19.0")
    wrong = [finding.text for finding in found("versions", tmp_path) if finding.kind == "wrong"]
    assert wrong and wrong[-1].startswith("DeepSpeed 0.19.0 computes wrong gradients")
    with pytest.raises(EnvironmentSetupError):
        deepspeed_version.refuse_known_faults(2)


def test_little_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "LEAST_SHARED_MEMORY", 1 << 60)
    [finding] = [finding for finding in found("memory", tmp_path) if finding.kind == "wrong"]
    assert finding.text.startswith(str(doctor_machine.SHARED_MEMORY)) and "--shm-size" in finding.remedy


def test_machines_with_the_same_findings_share_a_part() -> None:
    same, other = [Finding("disk", "ok", "x")], [Finding("disk", "wrong", "y", "z")]
    text = as_text({"a": same, "b": other, "c": same}, [Finding("ranks", "ok", "3 ranks")])
    assert text.splitlines() == [
        "a, c",
        "  disk       ok       x",
        "b",
        "  disk       WRONG    y",
        f"{'':23}-> z",
        "  ranks      ok       3 ranks",
    ]


def test_json_for_programs() -> None:
    finding = Finding("disk", "wrong", "y", "z")
    report = json.loads(as_json({"a": [finding]}, []))
    assert report == {"machines": {"a": [{"topic": "disk", "kind": "wrong", "text": "y", "remedy": "z"}]}, "ranks": []}
