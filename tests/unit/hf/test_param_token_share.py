"""A share of an elastic model in transformers: that of the extracted model, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron.checkpointing.store.checkpoint import Checkpoint, read_checkpoint
from megatron.errors import ConfigError
from megatron.hf.architectures.tokenformer import to_settings
from megatron.hf.modeling_tokenformer import TokenFormerConfig
from megatron.loaded_model.loaded_model import load_model
from megatron.mpu.context import ParallelContext
from tests.helpers.configs import TOKENFORMER
from tests.helpers.tiny_checkpoints import export, make_checkpoint, tokens, write_yaml
from tools.ckpts import extract

KEYS: dict[str, Any] = TOKENFORMER | {"qkv_slot_num": 32, "proj_slot_num": 32, "param_token_groups": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(write_yaml(tmp_path_factory.mktemp("elastic"), KEYS))


def test_a_share_is_the_extracted_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """To 1e-6 of the largest logit: the share of the whole folder, and the folder of the extracted checkpoint."""
    words = ["--input_dir", str(checkpoint.path), "--output_dir", str(tmp_path / "half"), "--share", "0.5"]
    assert extract.main(words) == 0
    half = read_checkpoint(tmp_path / "half" / checkpoint.path.name)
    expected = load_model(half.config, half, ParallelContext.single(), torch.device("cpu")).logits(tokens())
    whole, small = export(checkpoint, tmp_path / "whole_hf"), export(half, tmp_path / "half_hf")
    for folder, share in ((whole, 0.5), (small, 1.0)):
        theirs = AutoModelForCausalLM.from_pretrained(folder, param_token_share=share)
        with torch.no_grad():
            logits = theirs(tokens()).logits
        assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_shares_that_there_are_not_are_refused() -> None:
    with pytest.raises(ValueError, match=r"param_token_share 0\.3 is no whole number of the 768 tokens of a group"):
        TokenFormerConfig(param_token_share=0.3)
    with pytest.raises(ValueError, match=r"param_token_share 1\.5 is not above 0 and up to 1"):
        TokenFormerConfig(param_token_share=1.5)
    with pytest.raises(ValueError, match="num_qkv_tokens 768 is not a multiple of param_token_groups 5"):
        TokenFormerConfig(param_token_groups=5)
    with pytest.raises(ConfigError, match=r"param_token_share: 0\.5 in config.json reads a part"):
        to_settings(TokenFormerConfig(param_token_share=0.5))
