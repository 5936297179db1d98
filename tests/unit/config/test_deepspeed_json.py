"""DeepSpeed's own configuration code reads what we write, and knows every key of it."""

import re
from pathlib import Path

import pytest

from megatron.config.deepspeed_json import deepspeed_config
from megatron.config.load_config import load_config

TOKENFORMER = Path(__file__).parent / "published_tokenformer.yml"


@pytest.mark.parametrize("precision", ["fp32", "bfloat16", "fp16"])
def test_deepspeed_reads_it(precision: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    loaded = load_config([TOKENFORMER], [f"precision={precision}", "gradient_clipping=0.5", "fp16.hysteresis=3"])
    written = deepspeed_config(loaded.run, loaded.batch(1))
    read = DeepSpeedConfig(written)
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (
        128,
        32,
        4,
    )
    assert read.gradient_clipping == 0.5
    assert read.zero_config.stage == 1
    assert not read.zero_config.overlap_comm
    assert read.pipeline["use_reentrant"] is False
    assert read.grad_accum_dtype == "fp32"
    assert read.steps_per_print is None
    assert not read.wall_clock_breakdown
    assert not read.load_universal_checkpoint
    assert read.float16_config.enabled == (precision == "fp16")
    assert read.bfloat16_config.enabled == (precision == "bfloat16")
    if precision == "fp16":
        assert read.float16_config.initial_dynamic_scale() == 2**12
        assert read.float16_config.hysteresis == 3


def test_deepspeed_knows_every_key() -> None:
    """DeepSpeed ignores top-level keys that it does not know, so each must stand in its sources."""
    import deepspeed.runtime

    runtime = Path(deepspeed.runtime.__file__).parent
    constants = (runtime / "constants.py").read_text() + (runtime / "zero" / "config.py").read_text()
    constants += (runtime / "precision_config.py").read_text() + (runtime / "config.py").read_text()
    for precision in ("bfloat16", "fp16"):
        loaded = load_config([TOKENFORMER], [f"precision={precision}"])
        for key in deepspeed_config(loaded.run, loaded.batch(1)):
            assert re.search(rf"[\"']{key}[\"']", constants), key
