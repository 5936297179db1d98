"""All that a run imports and caches, for the process that runs are forked from."""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path

import yaml

from megatron.config.load_config import load_config
from megatron.data.tokenizer import build_tokenizer
from megatron.model.causal_lm import VocabSize, build_local
from tests.helpers.configs import PYTHIA, TOKENFORMER

for module in (
    "deepspeed",
    "train",
    "megatron.launch.environment",
    "megatron.training.pretrain",
    # Imported when the first engine is made.
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
    "torch.utils.serialization",
):
    importlib.import_module(module)

with tempfile.TemporaryDirectory() as folder:
    for name, base in {"tokenformer": TOKENFORMER, "pythia": PYTHIA}.items():
        # Lists all keys of the configuration, which takes as long as a tiny run, and fills registries.
        config = Path(folder) / f"{name}.yml"
        config.write_text(yaml.safe_dump(base))
        run = load_config([config]).run
        build_tokenizer(run.data.tokenizer)
        build_local(run.model, VocabSize(512, 512), seed=None)


def no_flush(descriptor: int) -> None:
    """Leaves the file to the system: no test cuts the power."""


os.fsync = no_flush  # type: ignore[assignment]
