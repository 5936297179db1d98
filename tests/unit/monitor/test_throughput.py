"""Rates, utilization, waiting and time left, on a clock that the test moves."""

import subprocess
import sys

import pytest
import torch

from megatron.monitor.throughput import Throughput, TimedIterator, peak_memory_gib
from megatron.planner.devices import peak_flops


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_seconds(self, seconds: float) -> None:
        self.now += seconds


def _meter(clock: Clock, **settings: float) -> Throughput:
    return Throughput(tokens_per_step=2048, iteration=100, total_iterations=200, clock=clock, **settings)


def test_rates_cover_the_steps_since_the_last_call() -> None:
    clock = Clock()
    meter = _meter(clock)
    clock.pass_seconds(5.0)
    first = meter.measure(110, data_wait_seconds=0.5)
    assert first == {
        "train/tokens_per_second": pytest.approx(10 * 2048 / 5.0),
        "train/step_seconds": pytest.approx(0.5),
        "train/data_wait_share": pytest.approx(0.1),
        "train/seconds_left": pytest.approx(90 * 0.5),
    }
    clock.pass_seconds(2.0)
    second = meter.measure(112, data_wait_seconds=1.5)
    assert second["train/tokens_per_second"] == pytest.approx(2048.0)
    assert second["train/data_wait_share"] == pytest.approx(0.5)


def test_no_steps_no_rates() -> None:
    clock = Clock()
    meter = _meter(clock)
    clock.pass_seconds(1.0)
    assert meter.measure(100, 0.0) == {}


def test_evaluating_and_saving_slow_the_run_but_not_its_rate() -> None:
    clock = Clock()
    meter = _meter(clock)
    clock.pass_seconds(4.0)
    with meter.paused("evaluation"):
        clock.pass_seconds(6.0)
    metrics = meter.measure(110, 0.0)
    assert metrics["train/tokens_per_second"] == pytest.approx(10 * 2048 / 4.0)
    assert metrics["train/seconds_left"] == pytest.approx(90 * 1.0)
    assert metrics["train/evaluation_seconds"] == pytest.approx(6.0)
    clock.pass_seconds(4.0)
    assert meter.measure(120, 0.0)["train/step_seconds"] == pytest.approx(0.4)


def test_waiting_for_saves_is_told_once() -> None:
    clock = Clock()
    meter = _meter(clock)
    clock.pass_seconds(4.0)
    for seconds in (1.0, 0.5):
        with meter.paused("save_wait"):
            clock.pass_seconds(seconds)
    metrics = meter.measure(110, 0.0)
    assert metrics["train/save_wait_seconds"] == pytest.approx(1.5)
    assert metrics["train/step_seconds"] == pytest.approx(0.4)
    clock.pass_seconds(4.0)
    assert "train/save_wait_seconds" not in meter.measure(120, 0.0)


def test_time_left_forgets_a_slow_start_and_ends_at_zero() -> None:
    clock = Clock()
    meter = Throughput(tokens_per_step=1, iteration=0, total_iterations=1000, clock=clock)
    clock.pass_seconds(100.0)
    slow = meter.measure(10, 0.0)["train/seconds_left"]
    assert slow == pytest.approx(990 * 10.0)
    for step in range(20, 990, 10):
        clock.pass_seconds(10.0)
        left = meter.measure(step, 0.0)["train/seconds_left"]
    assert left == pytest.approx(20 * 1.0, rel=1e-3)
    clock.pass_seconds(10.0)
    assert meter.measure(1000, 0.0)["train/seconds_left"] == 0.0


def test_mfu_is_model_flops_over_peak_and_absent_unless_both_are_known() -> None:
    clock = Clock()
    meter = _meter(clock, flops_per_token=1.0246e9, peak_flops=8 * 312e12)
    clock.pass_seconds(1.0)
    assert meter.measure(101, 0.0)["train/mfu"] == pytest.approx(1.0246e9 * 2048 / (8 * 312e12))
    for known in ({"flops_per_token": 1e9}, {"peak_flops": 1e15}):
        meter = _meter(clock, **known)
        clock.pass_seconds(1.0)
        assert "train/mfu" not in meter.measure(101, 0.0)


def test_the_iterator_times_only_the_waiting() -> None:
    clock = Clock()

    def slow_items():
        for item in "abc":
            clock.pass_seconds(0.25)
            yield item

    data = TimedIterator(slow_items(), clock)
    seen = []
    for item in data:
        seen.append(item)
        clock.pass_seconds(10.0)
    assert seen == ["a", "b", "c"]
    assert data.wait_seconds == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-PCIE-40GB", "fp16", 312.0),
        ("NVIDIA A100 80GB PCIe", "bf16", 312.0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA GB200", "bf16", 2500.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla V100-SXM2-32GB", "fp16", 125.0),
        ("AMD Instinct MI250X", "bf16", 191.5),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_known_peaks(name: str, dtype: str, tflops: float) -> None:
    assert peak_flops(name, dtype) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA A100-SXM4-80GB", "fp32"),  # may or may not run as TF32
        ("Tesla V100-SXM2-32GB", "bf16"),  # no units for it
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "bf16"),  # a slice
        ("GRID A100-20C", "bf16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),
        ("NVIDIA H200 NVL", "bf16"),  # slower boards and other parts with a known one's name
        ("NVIDIA A10G", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA GeForce RTX 4090 D", "bf16"),
        ("AMD Instinct MI250X / MI250", "bf16"),
        ("Some Future Accelerator", "bf16"),
        ("", "bf16"),
    ],
)
def test_a_peak_is_never_guessed(name: str, dtype: str) -> None:
    assert peak_flops(name, dtype) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, its own memory is measured")
def test_peak_memory_is_what_the_process_has_held() -> None:
    code = (
        "from megatron.monitor.throughput import peak_memory_gib\n"
        "before = peak_memory_gib(); block = bytearray(2**29); block[::4096] = b'1' * 2**17; del block\n"
        "print(before, peak_memory_gib())"
    )
    # Started by a process that holds more than it will, whose peak is not its own.
    ballast = bytearray(2**30)
    ballast[::4096] = b"1" * 2**18
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
    before, after = map(float, output.split())
    assert before < 0.7
    assert after - before == pytest.approx(0.5, abs=0.1)
    assert peak_memory_gib() > 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_on_a_gpu() -> None:
    torch.cuda.reset_peak_memory_stats()
    before = peak_memory_gib()
    block = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    del block
    assert peak_memory_gib() - before == pytest.approx(0.25, abs=0.01)
