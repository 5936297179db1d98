"""The tests that megatron/hf/README.md names for its contracts exist."""

from __future__ import annotations

import re

from tests.helpers.forkserver import ROOT


def test_named_tests_exist() -> None:
    text = (ROOT / "megatron" / "hf" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    modules = (ROOT / "tests").glob("*/hf/test_*.py")
    defined = {name for path in modules for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    assert named
    assert named <= defined
