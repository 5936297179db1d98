"""Damaged and hostile YAMLs end in a message, never in a traceback, and in seconds."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.config.command_line import load_command_line
from megatron.config.yaml.yaml_files import MAX_BYTES, MAX_DEPTH, MAX_DIGITS, MAX_KEY, MAX_TEXT, MAX_VALUES
from megatron.errors import ConfigError
from tests.helpers.covers import covered

HERE = Path(__file__).parent
BASES = [
    (HERE / f"{name}.yml").read_bytes()
    for name in ("published_tokenformer", "published_pythia", "broken/unknown_tag", "broken/mistyped_numbers")
]
SECONDS = 20
"""A command that takes longer hangs [s]; one takes hundredths."""

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
SNIPPETS = [
    *(
        "!!int abc",
        "!!float x",
        "!!bool maybe",
        "!!null full",
        "!!str 5",
        "!!binary aGk=",
        "!!python/name:os.system",
        "!x",
    ),
    *("9" * 30, "9" * 5000, "0x" + "f" * 9000, "1e999", "-.inf", ".nan", "1_0_", "0" * 50, "6e-4", "12:30", "1e-400"),
    *(
        "[" * 500,
        "{a: " * 500,
        "- " * 500,
        "]" * 20,
        "}",
        "? ",
        "&a *a",
        "&a [*a]",
        "*none",
        "<<: *a",
        "%YAML 1.9\n---\n",
    ),
    *('"\\0"', '"\\ud800"', '"\\UFFFFFFFF"', '"\\x"', '"', "'", "\0", "\x1b[2J", "\ufeff", "\u2028", "\x85", "é", "\t"),
    *(
        "a" * 20_000,
        "k" * 300 + ": 1",
        "a." * 300 + "b: 1",
        "fp16: null",
        "optimizer: null",
        "---",
        "...",
        "# ",
        "|",
        ">9",
    ),
    *("https://u:p@h/", "hidden_size: [*x]", "num_layers: {}", "null: null", "? [a]\n: b", ": :", "!<!int> 5", BOMB),
]


@contextmanager
def limited() -> Iterator[None]:
    """Raises TimeoutError in a body that hangs."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the command hangs: more than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def check(*words: str) -> str | None:
    """What `--check` says of a command's files and overrides: None when it accepts them."""
    with limited():
        try:
            load_command_line([*words, "--check"])
        except ConfigError as error:
            assert error.exit_code == 2
            return str(error)
    return None


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A YAML with up to four damages: bytes that flip, parts that are lost, doubled or moved, hostile parts put in."""
    content = draw(st.sampled_from(BASES))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(start + draw(st.integers(0, 200)), len(content))
        before, part, after = content[:start], content[start:stop], content[stop:]
        match draw(st.sampled_from(["flip", "lose", "double", "move", "insert", "value"])):
            case "flip":
                content = before + bytes(byte ^ (1 << draw(st.integers(0, 7))) for byte in part[:1]) + part[1:] + after
            case "lose":
                content = before + after
            case "double":
                content = before + part + part + after
            case "move":
                content = part + before + after
            case "insert":
                content = before + draw(st.sampled_from(SNIPPETS)).encode() + part + after
            case "value":
                key, colon, value = part.partition(b":")
                content = before + key + colon + draw(st.sampled_from(SNIPPETS)).encode() + value[10:] + after
    return content


@pytest.mark.timeout(900)
@pytest.mark.parametrize("examples", covered([100, 1000], [100]))
def test_damaged_files(examples: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "damaged.yml"

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(mutated())
    def test(content: bytes) -> None:
        path.write_bytes(content)
        said = check(str(path))
        assert said is None or str(path) in said or "missing key" in said
        capsys.readouterr()

    test()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("!!int abc", "the tag !!int stands before something else than a whole number"),
        ("!!float abc", "the tag !!float stands before something else than a number"),
        ("!!bool maybe", "the tag !!bool stands before something else than true or false"),
        ("!!null 5", "the tag !!null stands before something else than null"),
        ("9" * 5000, f"a number of 5,000 characters; at most {MAX_DIGITS} are read"),
        ("0x" + "f" * 5000, f"a number of 5,002 characters; at most {MAX_DIGITS} are read"),
        ("[" * 100_000, f"lists and mappings are nested more than {MAX_DEPTH} deep"),
        ("{a: " * 100_000, f"lists and mappings are nested more than {MAX_DEPTH} deep"),
        ('"\\0"', "the text holds U+0000 or a lone surrogate"),
        ('"\\ud800"', "the text holds U+0000 or a lone surrogate"),
        ('"\\UFFFFFFFF"', "an escape or a directive holds a number that is too large"),
        ("x" * (MAX_TEXT + 1), f"a text of 10,001 characters; at most {MAX_TEXT:,} are read"),
    ],
    ids=lambda text: text[:16],
)
def test_limits_of_a_value(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    path.write_text(f"seed: 1\nsave: {text}\n")
    message = check(str(path))
    assert message is not None
    assert said in message
    assert message.startswith((f"{path}:2: ", f"{path}: "))
    assert len(message) < 500


@pytest.mark.parametrize("deep", ["lists", "mappings"])
def test_aliases_that_expand_to_billions(deep: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.yml"
    first, entry = ("[x, x, x, x, x, x, x, x, x]", "[{}]") if deep == "lists" else ("{k: v}", "{{{}}}")
    names = [f"n{number}" for number in range(12)]
    lines = [f"n0: &n0 {first}"]
    for before, name in pairwise(names):
        inner = ", ".join(f"*{before}" if deep == "lists" else f"k{index}: *{before}" for index in range(9))
        lines.append(f"{name}: &{name} {entry.format(inner)}")
    path.write_text("\n".join(lines) + "\n")
    start = time.perf_counter()
    message = check(str(path))
    assert message is not None
    assert f"more than {MAX_VALUES:,} values, with those that aliases repeat" in message
    assert time.perf_counter() - start < SECONDS / 2


def test_thousands_of_unknown_keys_are_answered_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "keys.yml"
    path.write_text("".join(f"attention_x{number}: 1\n" for number in range(4000)))
    message = check(str(path))
    assert message is not None
    assert len(message.splitlines()) < 110
    assert message.splitlines()[-1].startswith("... and ")


def test_long_keys(tmp_path: Path) -> None:
    path = tmp_path / "key.yml"
    path.write_text(f"? {'a.' * MAX_KEY}\n: 1\n")
    assert check(str(path)) == f"{path}:1: expected a key of up to {MAX_KEY} letters, digits and underscores"
    words = check(str(HERE / "published_pythia.yml"), f"{'a.' * MAX_KEY}b=1")
    assert words is not None
    assert f"expected a key of at most {MAX_KEY} characters" in words


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "model.yml"
    path.write_bytes(b"a" * (MAX_BYTES + 1))
    assert check(str(path)) == f"{path}: is larger than 4 MiB, and so no configuration; is it the right file?"
    path.unlink()
    path.symlink_to("/dev/zero")
    assert check(str(path)) == f"{path}: is larger than 4 MiB, and so no configuration; is it the right file?"
