"""The tests that megatron/hf/README.md names for its contracts exist."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parents[1] / "megatron/hf/README.md"


def test_named_tests_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", README.read_text(encoding="utf-8")))
    defined = {
        name for path in HERE.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert named
    assert named <= defined


def test_every_contract_of_the_model_is_named() -> None:
    text = README.read_text(encoding="utf-8")
    tests = re.findall(r"^def (test_\w+)", (HERE / "test_modeling_tokenformer.py").read_text(), re.M)
    assert [name for name in tests if f"`{name}`" not in text] == []
