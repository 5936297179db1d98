"""Every YAML in broken/ gets exactly the message that stands beside it."""

import re
from pathlib import Path

import pytest

from megatron.config.load_config import load_config
from megatron.errors import ConfigError

BROKEN = Path(__file__).parent / "broken"


def message_of(name: str) -> str:
    """The error of broken/NAME.yml, or of broken/NAME.*.yml together; its first line may hold overrides or ranks."""
    files = [Path(file.name) for file in sorted(BROKEN.glob(f"{name}.*yml"))]
    first_line = files[0].read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    overrides = re.findall(r"\S+=\S+", first_line) if first_line.startswith("# overrides:") else []
    with pytest.raises(ConfigError) as caught:
        loaded = load_config(files, overrides)
        loaded.batch(int(first_line.removeprefix("# world-size:")))
    return str(caught.value)


@pytest.mark.parametrize("name", sorted({file.name.partition(".")[0] for file in BROKEN.iterdir()}))
def test_message(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BROKEN)
    assert message_of(name) == (BROKEN / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n")
