"""Transformers' own common tests of models, run for the modelling file of an export and, beside it, for GPTNeoX.

`make test-transformers` runs this file; `make test` does not collect it, because the mixins come from transformers'
source distribution. tools/checks/run_transformers_tests.py fetches that and names its folder in TRANSFORMERS_TESTS.
"""

from __future__ import annotations

import importlib
import os
import unittest
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    GPTNeoXModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto as auto

from megatron.hf import (
    TokenFormerConfig,
    TokenFormerForCausalLM,
    TokenFormerForSequenceClassification,
    TokenFormerModel,
)
from tests.peers import absent_from_sdist

MIXINS = Path(os.environ["TRANSFORMERS_TESTS"])

modeling, configuration, training, tensor_parallel = (
    importlib.import_module(f"{MIXINS.name}.{name}")
    for name in (
        "test_modeling_common",
        "test_configuration_common",
        "test_training_mixin",
        "test_tensor_parallel_mixin",
    )
)
# The mixins choose labels and tasks by these lists of transformers' own models.
auto.MODEL_MAPPING_NAMES["tokenformer"] = "TokenFormerModel"
auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["tokenformer"] = "TokenFormerForCausalLM"
auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["tokenformer"] = "TokenFormerForSequenceClassification"
# Without this, the tests on ranks are for a list of transformers' own models.
tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = None


class TinyModel:
    """The tester that the mixins ask for configurations and inputs."""

    batch_size, seq_length, vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 13, 7, 99, 32, 2, 2
    num_labels, type_sequence_label_size, is_training = 3, 2, True

    def __init__(self, config_class: type[PreTrainedConfig], classes: tuple[type[PreTrainedModel], ...], **sizes: int):
        self.config_class = config_class
        self.base_model_class, self.causal_lm_class = classes[:2]
        self.sizes = sizes

    def get_config(self) -> PreTrainedConfig:
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **self.sizes,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        ids = modeling.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.tril(torch.ones_like(ids)),
        }


class CommonTests(
    modeling.ModelTesterMixin,
    absent_from_sdist.GenerationTesterMixin,
    training.TrainingTesterMixin,
    tensor_parallel.TensorParallelTesterMixin,
):
    """The mixins, and transformers' tests of configurations."""

    config_class: ClassVar[type[PreTrainedConfig]]
    sizes: ClassVar[dict[str, int]]
    model_tester: Any = None

    def setUp(self) -> None:
        self.model_tester = TinyModel(self.config_class, self.all_model_classes, **self.sizes)

    def test_config(self) -> None:
        configuration.ConfigTester(self, config_class=self.config_class).run_common_tests()


class TestTokenFormer(CommonTests, unittest.TestCase):
    config_class = TokenFormerConfig
    all_model_classes = (TokenFormerModel, TokenFormerForCausalLM, TokenFormerForSequenceClassification)
    sizes: ClassVar[dict[str, int]] = {"num_qkv_tokens": 24, "num_proj_tokens": 20, "num_ffn_tokens": 40}


class TestGPTNeoX(CommonTests, unittest.TestCase):
    """The yardstick: a failure of these is transformers' own, or this machine's."""

    config_class = GPTNeoXConfig
    all_model_classes = (GPTNeoXModel, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification)
    sizes: ClassVar[dict[str, int]] = {"intermediate_size": 37}
