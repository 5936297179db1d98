"""Rates at which a device works: assumed from its data sheet, or measured by `--calibrate`."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field
from operator import itemgetter

from megatron.planner.devices import Device

ATTAINED = {"A100": 0.80, "A800": 0.80}
"""Share of the peak that large products of bf16 matrices attain, by the beginning of the device's name in torch: logs
of 0.56B models that train at 67 % of an A100's peak all in all."""
ATTAINED_ELSEWHERE = 0.66
"""The same where power limits it: 1.5B models train at 50 % of an H100's peak all in all."""
ATTENTION_ATTAINED = 0.40
"""Share of the peak that fused causal attention attains on half of the pairs of positions."""
BANDWIDTH_ATTAINED = 0.80
"""Share of the memory's rate that passes over tensors attain."""
LINK_ATTAINED = 0.75
"""Share of a link's rate that collectives attain."""
LATENCY = 20e-6
"""Time of the smallest collective [s]."""
CPU_FLOPS, CPU_BANDWIDTH, CPU_FUNCTIONS = 30e9, 4e9, 3e8
"""A core's products [FLOP/s], passes over tensors [bytes/s] and GeLUs [1/s], where nothing is measured."""
CPU_NETWORK = 1e9
"""Rate of collectives among processes of one machine [bytes/s], where nothing is measured."""


@dataclass(frozen=True)
class Curve:
    """A rate that depends on the size of the work."""

    points: tuple[tuple[float, float], ...]
    """(size, rate), in the order of sizes."""

    def at(self, size: float) -> float:
        """Returns the rate at a size: between two sizes along their logarithms, beyond them that of the nearest."""
        place = bisect.bisect_left(self.points, size, key=itemgetter(0))
        if place in (0, len(self.points)):
            return self.points[min(place, len(self.points) - 1)][1]
        (low, slow), (high, fast) = self.points[place - 1 : place + 1]
        share = math.log(size / low) / math.log(high / low)
        return math.exp(math.log(slow) + share * (math.log(fast) - math.log(slow)))


@dataclass(frozen=True)
class Rates:
    """Rates of one rank."""

    products: Curve
    """Matrix products in the run's number format, by their size [FLOP -> FLOP/s]."""
    attention: float
    """Fused causal attention, counted over the pairs of positions that are not masked [FLOP/s]."""
    passes: Curve
    """Reading and writing tensors by plain operations, by a tensor's size [bytes -> bytes/s]."""
    functions: float | None
    """GeLUs and exponentials, where they take longer than their bytes [1/s]."""
    link: float
    """Collectives within a machine, the data that each link carries [bytes/s]."""
    network: float
    """The same between machines, for each device of a machine [bytes/s]."""
    latency: float
    """Time of the smallest collective [s]."""
    watts: float | None
    """Power of a rank's device [W]; None where it is not known."""
    source: str
    """Origin of these rates, in words."""
    assumptions: tuple[str, ...] = field(default=())
    """What is assumed in them, a line each."""


def assumed_rates(device: Device, dtype: str) -> Rates:
    """Returns the rates of a device by its data sheet."""
    peak = device.tflops * 1e12
    half = next((value for name, value in ATTAINED.items() if device.torch_name.startswith(name)), ATTAINED_ELSEWHERE)
    lines = [
        f"matrix products at {half:.0%} of {device.tflops:g} TFLOP/s, attention at {ATTENTION_ATTAINED:.0%}, passes "
        f"over tensors at {BANDWIDTH_ATTAINED:.0%} of {device.bandwidth:,g} GB/s",
        f"collectives at {LINK_ATTAINED:.0%} of {device.link:g} GB/s in a machine and of {device.network:g} GB/s a "
        "device between machines; nothing overlaps",
        f"power: {device.watts:g} W a device, its limit, without the rest of the machine",
    ]
    if dtype not in device.dtypes:
        peak /= 2 if dtype == "fp32" else 1
        reason = "TF32 is half of it" if dtype == "fp32" else f"it has no units for {dtype}"
        lines.append(f"{dtype} at {peak / 1e12:g} TFLOP/s: {reason}")
    return Rates(
        products=Curve(((1.0, peak * half),)),
        attention=peak * ATTENTION_ATTAINED,
        passes=Curve(((1.0, device.bandwidth * 1e9 * BANDWIDTH_ATTAINED),)),
        functions=None,
        link=device.link * 1e9 * LINK_ATTAINED,
        network=device.network * 1e9 * LINK_ATTAINED,
        latency=LATENCY,
        watts=device.watts,
        source=f"assumed from the data sheet of {device.name}, not measured",
        assumptions=tuple(lines),
    )


def assumed_cpu_rates(cores: float) -> Rates:
    """Returns rough rates of `cores` of a processor, before anything is measured."""
    return Rates(
        products=Curve(((1.0, CPU_FLOPS * cores),)),
        attention=CPU_FLOPS * cores / 2,
        passes=Curve(((1.0, CPU_BANDWIDTH * cores),)),
        functions=CPU_FUNCTIONS * cores,
        link=CPU_NETWORK,
        network=CPU_NETWORK / 10,
        latency=1e-3,
        watts=None,
        source="a guess: nothing was measured on this machine; --calibrate does",
        assumptions=(
            f"{CPU_FLOPS / 1e9:g} GFLOP/s and {CPU_BANDWIDTH / 1e9:g} GB/s for each of {cores:g} cores of a rank",
        ),
    )
