"""Secrets stay at home, settings do not."""

from collections.abc import Iterator
from typing import get_args

import pytest
from pydantic import BaseModel

from megatron.config.redaction import REDACTED, redact
from megatron.config.sections.run_config import RunConfig


@pytest.mark.parametrize(
    "name",
    [
        "api_key",
        "WANDB_API_KEY",
        "wandb-api-key",
        "apikey",
        "awsSecretAccessKey",
        "AWS_ACCESS_KEY_ID",
        "HF_TOKEN",
        "hub_token",
        "api_tokens",
        "GITHUB_TOKEN_2",
        "client_secret",
        "db_password",
        "PASSWD",
        "ssh_passphrase",
        "tokenizer_api_key",
    ],
)
def test_secrets_are_found_at_any_depth(name: str) -> None:
    dump = {"launch": {"env": [{name: "hunter2", "other": "kept"}]}, name: ["hunter2", "hunter3"]}
    assert redact(dump) == {
        "launch": {"env": [{name: REDACTED, "other": "kept"}]},
        name: [REDACTED, REDACTED],
    }


def test_all_under_a_secrets_name_is_secret() -> None:
    dump = {"secrets": {"user": "me", "pin": 1234, "none": None}, "password": 123456}
    assert redact(dump) == {"secrets": {"user": REDACTED, "pin": REDACTED, "none": None}, "password": REDACTED}


def test_settings_are_kept() -> None:
    dump = {
        "qkv_scale_base": 768,
        "maximum_tokens": 64,
        "key_tokens": 3072,
        "tokens_per_step": 2097152,
        "token_dropout": False,
        "tokenizer_type": "HFTokenizer",
        "tokenizer": {"vocab_file": "data/20B_tokenizer.json", "type": "HFTokenizer"},
        "eod_token": "<|endoftext|>",
        "pad-token": "<pad>",
        "architecture": "tokenformer",
        "param_tokens": {"ffn": 3072, "norm": "l2_norm_gelu", "keyword": None},
        "keys": [1, 2, 3],
    }
    assert redact(dump) == dump


def _holds_text(annotation: object) -> bool:
    return annotation is str or isinstance(annotation, str) or any(map(_holds_text, get_args(annotation)))


def _text_fields(section: type[BaseModel], path: str = "") -> Iterator[str]:
    """Dotted names of the configuration's fields that may hold text."""
    for name, field in section.model_fields.items():
        if _holds_text(field.annotation):
            yield f"{path}{name}"
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _text_fields(part, f"{path}{name}.")


def test_no_setting_is_lost_by_accident() -> None:
    names = list(_text_fields(RunConfig))
    assert {"data.tokenizer.vocab_file", "model.param_tokens.theta"} <= set(names)
    for name in names:
        nested: object = "text"
        for part in reversed(name.split(".")):
            nested = {part: nested}
        assert redact(nested) == nested, name


def test_the_dump_itself_is_not_changed() -> None:
    dump = {"api_key": "hunter2", "inner": {"api_key": "hunter2"}}
    redact(dump)
    assert dump == {"api_key": "hunter2", "inner": {"api_key": "hunter2"}}
