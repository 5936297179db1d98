"""Plans of whole runs: closed forms of what ZeRO-1 allocates, and what must grow or shrink with what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.config.load_config import load_config
from megatron.errors import ConfigError
from megatron.io.user_cache import user_cache
from megatron.planner.calibration import (
    Calibration,
    NumberFormat,
    calibration_file,
    find_calibration,
    write_calibration,
)
from megatron.planner.devices import DEVICES, device_of, named_device
from megatron.planner.layouts import layout_keys, layouts
from megatron.planner.memory import ACTIVATIONS, GRADIENTS, MASTERS, WEIGHTS
from megatron.planner.plan import Plan, make_plan
from megatron.planner.target import find_target

CONFIGS = Path(__file__).parents[3] / "configs"
GIB = 2**30


@pytest.fixture(autouse=True)
def no_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plan(config: str, world_size: int, *overrides: str, device: str = "a100-80gb") -> Plan:
    loaded = load_config([CONFIGS / config], overrides)
    run = loaded.run
    target = find_target(device, run.launch, world_size, run.training.precision.dtype)
    return make_plan(run, loaded.batch(world_size), world_size, run.model.padded_vocab_size or 50304, target)


def test_zero_1_in_closed_form() -> None:
    """1.5B in bf16 on 64 ranks: weights, fp32 gradients, a 64th of masters and moments."""
    found = plan("tokenformer/1-5B.yml", 64, "fp16=null", "precision=bfloat16")
    parameters = 1_587_219_456
    parts = found.largest.parts
    assert parts[WEIGHTS] == 2 * parameters
    assert parts[GRADIENTS] == 4 * parameters
    assert parts[MASTERS] == pytest.approx(12 * parameters / 64)
    # One residual stream for each layer that is computed again, and what surrounds the layers.
    stream = 8 * 2048 * 1536 * 2
    assert parts[ACTIVATIONS] == pytest.approx(42 * stream, rel=0.001)
    disk = found.disk()
    assert disk.each == pytest.approx(14 * parameters, rel=1e-4)
    assert not disk.is_saved


def test_checkpoints_of_the_published_schedule() -> None:
    """Pythia's 154 checkpoints, all of them kept, and the six of TokenFormer's with one being written."""
    pythia = plan("pythia/160M.yml", 8, "save=runs/x").disk()
    assert (pythia.saves, pythia.kept, pythia.most) == (154, 154, 154)
    tokenformer = plan("tokenformer/150M.yml", 8, "save=runs/x").disk()
    assert (tokenformer.kept, tokenformer.most) == (6, 7)
    assert tokenformer.saves == 143000 // 500 + 11


def test_memory_shrinks_with_what_saves_it() -> None:
    words = ("fp16=null", "precision=bfloat16")
    kept, scores, layers = (
        plan("tokenformer/1-5B.yml", 64, *words, *own).largest.peak
        for own in (("checkpoint_activations=false",), ("checkpoint_activations=false", "recompute_scores=true"), ())
    )
    assert layers < scores < kept
    assert (
        plan("tokenformer/1-5B.yml", 128, *words).largest.peak < plan("tokenformer/1-5B.yml", 64, *words).largest.peak
    )
    split = plan("tokenformer/1-5B.yml", 64, *words, "model_parallel_size=2", "checkpoint_activations=false")
    assert split.largest.peak < kept
    asynchronous = plan("tokenformer/1-5B.yml", 64, *words, "save=runs/x", "async_save=true").largest.host_copy
    assert asynchronous == pytest.approx(1_587_219_456 * (2 + 12 / 64))


def test_time_follows_operations_bytes_and_messages() -> None:
    words = ("fp16=null", "precision=bfloat16", "train_micro_batch_size_per_gpu=4")
    again = plan("tokenformer/1-5B.yml", 64, *words)
    kept = plan("tokenformer/1-5B.yml", 64, *words, "checkpoint_activations=false")
    assert again.step.parts["matrix products"] == pytest.approx(4 / 3 * kept.step.parts["matrix products"])
    # 6 operations for each weight of a layer and token, at the rate that the report says.
    weights = 40 * 32 * 1536**2 // 2
    tokens = 1024 * 2048 / 64
    assert kept.step.parts["matrix products"] == pytest.approx(6 * weights * tokens / (0.8 * 312e12), rel=1e-6)
    # A ring of 64 ranks, eight on a machine: 63/64 of fp32 gradients, and of bf16 weights.
    volume = 63 / 64 * 1_587_219_456 * (4 + 2)
    sent = kept.step.parts["gradients over data-parallel ranks"]
    assert sent == pytest.approx(volume / (8 * 25e9 * 0.75), rel=0.01)
    piped = plan("tokenformer/1-5B.yml", 64, *words, "checkpoint_activations=false", "pipe_parallel_size=4")
    waits = piped.step.parts["waiting for other stages"]
    busy = sum(piped.step.parts[part] for part in piped.step.parts if "rank" not in part and "optimizer" not in part)
    assert waits / (busy - waits) == pytest.approx(3 / piped.batch.gradient_accumulation_steps, rel=0.02)


def test_layouts_keep_the_batch_and_can_be_pasted() -> None:
    configured = plan("tokenformer/1-5B.yml", 64, "fp16=null", "precision=bfloat16")
    found = layouts(configured.run, 1024, 64, 50304, configured.target)
    fitting = [one for one in found if one.fits]
    times = [one.step.total for one in fitting]
    assert times == sorted(times)
    assert found[: len(fitting)] == fitting
    assert {one.batch.global_batch_size for one in found} == {1024}
    assert fitting[0].step.total <= configured.step.total
    words = ["fp16=null", "precision=bfloat16", *(f"{k}={json.dumps(v)}" for k, v in layout_keys(fitting[-1]).items())]
    again = load_config([CONFIGS / "tokenformer/1-5B.yml"], words)
    assert again.batch(64) == fitting[-1].batch
    assert make_plan(again.run, again.batch(64), 64, 50304, configured.target).step.total == fitting[-1].step.total


def test_known_and_unknown_devices() -> None:
    assert named_device("A100_80GB").name == "a100-80gb"
    assert device_of("NVIDIA H200") is named_device("h200")
    assert len({device.name for device in DEVICES}) == len(DEVICES)
    with pytest.raises(ConfigError, match=r"--device h201: the planner does not know this device. Did you mean .*h200"):
        named_device("h201")


def measured(device: str = "h200", **changes: object) -> Calibration:
    values: dict[str, object] = {
        "device": device,
        "host": "here",
        "date": "2026-01-01",
        "ranks": 8,
        "memory": 141e9,
        "formats": {"bf16": NumberFormat([[1e9, 1e14], [1e12, 6e14]], 4e14)},
        "passes": [[1e6, 3e12]],
        "functions": 1e12,
        "link": 3e11,
        "network": None,
        "latency": 2e-5,
        "load": 0.1,
    }
    return Calibration(**(values | changes))  # type: ignore[arg-type]


def test_what_was_measured_comes_before_what_is_assumed() -> None:
    words = ("fp16=null", "precision=bfloat16")
    assumed = plan("tokenformer/1-5B.yml", 64, *words, device="h200")
    write_calibration(measured())
    found = plan("tokenformer/1-5B.yml", 64, *words, device="h200")
    assert "measured on here" in found.target.rates.source
    assert found.target.rates.products.at(1e15) == 6e14
    assert found.target.rates.products.at(10**10.5) == pytest.approx((1e14 * 6e14) ** 0.5)
    assert found.step.parts["matrix products"] != assumed.step.parts["matrix products"]
    assert found.target.rates.link == 3e11
    # Another number format was not measured, and a device that no data sheet is known of can be planned for.
    assert "assumed" in plan("tokenformer/1-5B.yml", 64, device="h200").target.rates.source
    write_calibration(measured("nvidia-x9"))
    assert plan("tokenformer/1-5B.yml", 64, *words, device="nvidia-x9").target.memory == 141e9


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b'{"version": 1}',
        b"\xff\xfe",
        json.dumps({"version": 2}).encode(),
        json.dumps({"version": 1, "formats": {"bf16": {"products": "x", "attention": 1}}}).encode(),
        json.dumps({"version": 1, "formats": {"bf16": 3}}).encode(),
    ],
)
def test_a_damaged_calibration_counts_as_none(content: bytes) -> None:
    file = write_calibration(measured())
    assert find_calibration("h200", "bf16") is not None
    file.write_bytes(content)
    assert find_calibration("h200", "bf16") is None
    write_calibration(measured())
    assert find_calibration("h200", "bf16") is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"passes": []},
        {"passes": [[1.0, 0.0]]},
        {"passes": [[2.0, 1.0], [1.0, 1.0]]},
        {"memory": -1.0},
        {"link": "fast"},
        {"host": 3},
        {"ranks": 0},
    ],
)
def test_senseless_rates_are_not_used(changes: dict[str, object]) -> None:
    write_calibration(measured(**changes))
    assert find_calibration("h200", "bf16") is None


def test_calibrations_lie_in_the_users_cache() -> None:
    assert calibration_file("h200") == (user_cache() or Path()) / "calibration" / "h200.json"
