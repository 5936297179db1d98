"""Devices as data: memory, rates, links and power, from their vendors' data sheets."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron.errors import ConfigError

HALF = ("bf16", "fp16")
CPU = "cpu"
"""Name of the machine's processor, whose memory and rates are those of this machine."""


@dataclass(frozen=True)
class Device:
    """One accelerator."""

    name: str
    """Its name on the command line."""

    torch_name: str
    """Regular expression for the whole name that torch.cuda.get_device_name reports, without vendor and brand."""

    tflops: float
    """Dense rate of matrix products of each of `dtypes`, accumulating in fp32, without structured sparsity
    [10^12 FLOP/s]."""

    memory_gib: float
    """Memory that a driver leaves to programs, rounded down [GiB]."""

    bandwidth: float
    """Rate of its memory [10^9 bytes/s]."""

    link: float
    """Rate to another one in the same machine, in one direction [10^9 bytes/s]."""

    network: float
    """Share of a machine's network that one of its devices has, as such machines are usually built; no data sheet
    says it [10^9 bytes/s]."""

    watts: float
    """Limit of its power [W]."""

    dtypes: tuple[str, ...] = HALF


# Each rate is the vendor's own; where its data sheet prints the sparse rate, this is half of it. Names are matched to
# the end, because vendors sell slower boards, slices and custom parts under longer names. A device that is not here has
# no known peak: add it from its data sheet, never from a measurement or a sibling.
DEVICES = (
    # NVIDIA Tesla V100 data sheet; no bf16 units.
    Device("v100-16gb", r"V100-SXM2-16GB", 125.0, 15.7, 900, 150, 12.5, 300, ("fp16",)),
    Device("v100-32gb", r"V100-SXM2-32GB", 125.0, 31.7, 900, 150, 12.5, 300, ("fp16",)),
    Device("v100-pcie-16gb", r"V100-PCIE-16GB", 112.0, 15.7, 900, 16, 3, 250, ("fp16",)),
    Device("v100-pcie-32gb", r"V100-PCIE-32GB", 112.0, 31.7, 900, 16, 3, 250, ("fp16",)),
    # NVIDIA A100 and A800 data sheets: the same rate of products in every form. The A800's NVLink is slower.
    Device("a100-40gb", r"A100-SXM4?-40GB", 312.0, 39.3, 1555, 300, 25, 400),
    Device("a100-80gb", r"A100-SXM4?-80GB", 312.0, 79.1, 2039, 300, 25, 400),
    Device("a100-pcie-40gb", r"A100-PCIE-40GB", 312.0, 39.3, 1555, 32, 6, 250),
    Device("a100-pcie-80gb", r"A100-PCIE-80GB|A100 80GB PCIe", 312.0, 79.1, 1935, 32, 6, 300),
    Device("a800-40gb", r"A800-SXM4?-40GB", 312.0, 39.3, 1555, 200, 25, 400),
    Device("a800-80gb", r"A800-SXM4?-80GB", 312.0, 79.1, 2039, 200, 25, 400),
    Device("a800-pcie-40gb", r"A800-PCIE-40GB", 312.0, 39.3, 1555, 32, 6, 250),
    Device("a800-pcie-80gb", r"A800-PCIE-80GB|A800 80GB PCIe", 312.0, 79.1, 1935, 32, 6, 300),
    # NVIDIA A10 data sheet. The A10G is another part, without a published rate.
    Device("a10", r"A10", 125.0, 22.0, 600, 32, 3, 150),
    # NVIDIA A40 data sheet.
    Device("a40", r"A40", 149.7, 44.3, 696, 32, 6, 300),
    # NVIDIA L4 and L40S data sheets.
    Device("l4", r"L4", 121.0, 22.0, 300, 32, 3, 72),
    Device("l40s", r"L40S", 362.0, 44.3, 864, 32, 6, 350),
    # NVIDIA Ada GPU architecture paper. The 4090 D and the laptop part are others.
    Device("rtx-4090", r"RTX 4090", 165.2, 23.5, 1008, 32, 3, 450),
    # NVIDIA H100 Tensor Core GPU architecture paper (989.4, PCIe 756) and data sheets of H100 NVL (1,671 sparse), H800
    # and H200 (1,979 sparse). The H200 NVL, whose name is longer, is slower.
    Device("h100", r"H100 80GB HBM3", 989.4, 79.1, 3350, 450, 50, 700),
    Device("h800", r"H800", 989.4, 79.1, 3350, 200, 50, 700),
    Device("h200", r"H200", 989.4, 139.8, 4800, 450, 50, 700),
    Device("h100-pcie", r"H100 PCIe", 756.0, 79.1, 2000, 64, 12.5, 350),
    Device("h100-nvl", r"H100 NVL", 835.5, 93.1, 3938, 300, 12.5, 400),
    # NVIDIA Blackwell data sheet, per GPU: HGX B200 4,500 sparse, GB200 NVL72 5,000 sparse.
    Device("b200", r"B200", 2250.0, 178.0, 7700, 900, 50, 1000),
    Device("gb200", r"GB200", 2500.0, 184.0, 8000, 900, 50, 1200),
    # AMD Instinct MI250X data sheet: 383 per module, whose two dies torch sees as two devices.
    Device("mi250x", r"MI250X", 191.5, 63.9, 1638, 50, 12.5, 280),
    # AMD Instinct MI300X data sheet.
    Device("mi300x", r"MI300X", 1307.4, 191.5, 5300, 448, 50, 750),
)
ALIASES = {"a100": "a100-80gb", "v100": "v100-32gb", "a800": "a800-80gb", "h100-80gb": "h100", "h100-sxm": "h100"}
LARGEST = max(DEVICES, key=lambda device: device.memory_gib)


def device_of(torch_name: str) -> Device | None:
    """Returns the device that torch or its driver calls by this name; None for one that is not known."""
    model = re.sub(r"^((NVIDIA|AMD|Tesla|GeForce|Instinct) +)*", "", torch_name.strip())
    return next((device for device in DEVICES if re.fullmatch(device.torch_name, model)), None)


def named_device(name: str) -> Device:
    """Returns the device of a name on the command line. Raises ConfigError for one that is not known."""
    word = re.sub(r"[ _]+", "-", name.strip().lower())
    found = next((device for device in DEVICES if device.name == ALIASES.get(word, word)), None)
    if found is not None:
        return found
    known = [device.name for device in DEVICES]
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    guess = f" Did you mean {_either(near)}?" if near else ""
    raise ConfigError(
        f"--device {name}: the planner does not know this device.{guess} It knows {', '.join([CPU, *known])}. For "
        "another one, plan on a known one of no more memory, or run --calibrate on the machine itself."
    )


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Returns the peak dense rate of one device [FLOP/s] for matrix products in `dtype` (fp32, bf16 or fp16).

    None where it is not known. That includes slices of a device (MIG, virtual GPUs), and fp32, whose rate depends on
    whether torch may use TF32.
    """
    device = device_of(device_name)
    return None if device is None or dtype not in device.dtypes else device.tflops * 1e12


def _either(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
