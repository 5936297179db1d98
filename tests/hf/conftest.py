"""Tiny checkpoints of one rank, and a folder exported from one."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.checkpointing.store.checkpoint import Checkpoint
from tests.hf.checkpoints import MODELS, export, make_checkpoint, write_yaml


@pytest.fixture(scope="package")
def tokenformer(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A TokenFormer's checkpoint, float32."""
    return make_checkpoint(write_yaml(tmp_path_factory.mktemp("tokenformer"), MODELS["l2_norm_gelu"]))


@pytest.fixture(scope="package")
def pythia(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A Pythia's."""
    return make_checkpoint(write_yaml(tmp_path_factory.mktemp("pythia"), MODELS["pythia"]))


@pytest.fixture(scope="package")
def exported(tokenformer: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TokenFormer's folder."""
    return export(tokenformer, tmp_path_factory.mktemp("exported") / "hf")
