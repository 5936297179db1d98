"""The shipped recipes of distillation differ from those of their student in what distillation is, and in the batch."""

from __future__ import annotations

import pytest

from megatron.config.effective_config import changed_values
from megatron.config.load_config import LoadedConfig, load_config
from tests.helpers.forkserver import ROOT

CONFIGS = ROOT / "configs"


def loaded(name: str) -> LoadedConfig:
    names = (f"inheritune/{name}", "data/openwebtext_gpt2", "clusters/one_machine")
    return load_config([CONFIGS / f"{part}.yml" for part in names], ["save=runs/test"])


@pytest.mark.parametrize(("name", "tokens"), [("distil_50K", 49_152), ("distil_394K", 393_216)])
def test_distillation_of_the_paper(name: str, tokens: int) -> None:
    config, student = loaded(name), loaded("gpt2_medium_16").run
    run, distillation = config.run, config.run.distillation
    assert distillation is not None
    # Alpha 0.6 is the weight of the text.
    assert (1 - distillation.weight, distillation.temperature) == (0.6, 1.0)
    assert distillation.teacher == "runs/gpt2_medium_24"
    for ranks in (1, 2, 4, 8):
        assert config.batch(ranks).global_batch_size * run.model.seq_length == tokens
    assert run.training.train_iters == run.training.lr_schedule.decay_iters == 50_000
    assert run.training.lr_schedule.warmup * run.training.train_iters == 2000
    changed = {value.key for value in changed_values(student, run) if not value.key.startswith("distillation.")}
    assert changed <= {"train_batch_size", "train_micro_batch_size_per_gpu", "train_iters", "lr_decay_iters", "warmup"}
    assert config.warnings == ()
