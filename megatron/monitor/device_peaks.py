"""Peak arithmetic rates of accelerators: the denominator of model FLOPs utilization (MFU)."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class _Peak:
    """Dense matrix-product rate of one device, without structured sparsity, accumulating in fp32."""

    name: str
    """Regular expression for the whole name that torch.cuda.get_device_name reports, without vendor and brand."""

    tflops: float
    """Rate of each of `dtypes` [10^12 FLOP/s]."""

    dtypes: tuple[str, ...] = ("bf16", "fp16")


# Each rate is the vendor's own; where its data sheet prints the sparse rate, this is half of it. Names are matched to
# the end, because vendors sell slower boards, slices and custom parts under longer names. A device that is not here has
# no known peak: add it from its data sheet, never from a measurement or a sibling.
_PEAKS = (
    # NVIDIA Tesla V100 data sheet; no bf16 units.
    _Peak(r"V100-SXM2-\d+GB", 125.0, ("fp16",)),
    _Peak(r"V100-PCIE-\d+GB", 112.0, ("fp16",)),
    # NVIDIA A100 and A800 data sheets: the same rate in every form.
    _Peak(r"A[18]00-SXM4?-[48]0GB|A[18]00-PCIE-[48]0GB|A[18]00 80GB PCIe", 312.0),
    # NVIDIA A10 data sheet. The A10G is another part, without a published rate.
    _Peak(r"A10", 125.0),
    # NVIDIA A40 data sheet.
    _Peak(r"A40", 149.7),
    # NVIDIA L4 and L40S data sheets.
    _Peak(r"L4", 121.0),
    _Peak(r"L40S", 362.0),
    # NVIDIA Ada GPU architecture paper. The 4090 D and the laptop part are others.
    _Peak(r"RTX 4090", 165.2),
    # NVIDIA H100 Tensor Core GPU architecture paper (989.4, PCIe 756) and data sheets of H100 NVL (1,671 sparse), H800
    # and H200 (1,979 sparse). The H200 NVL, whose name is longer, is slower.
    _Peak(r"H100 80GB HBM3|H800|H200", 989.4),
    _Peak(r"H100 PCIe", 756.0),
    _Peak(r"H100 NVL", 835.5),
    # NVIDIA Blackwell data sheet, per GPU: HGX B200 4,500 sparse, GB200 NVL72 5,000 sparse.
    _Peak(r"B200", 2250.0),
    _Peak(r"GB200", 2500.0),
    # AMD Instinct MI250X data sheet: 383 per module, whose two dies torch sees as two devices.
    _Peak(r"MI250X", 191.5),
    # AMD Instinct MI300X data sheet.
    _Peak(r"MI300X", 1307.4),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Returns the peak dense rate of one device [FLOP/s] for matrix products in `dtype` (fp32, bf16 or fp16).

    None where it is not known. That includes slices of a device (MIG, virtual GPUs), and fp32, whose rate depends on
    whether torch may use TF32.
    """
    model = re.sub(r"^((NVIDIA|AMD|Tesla|GeForce|Instinct) +)*", "", device_name.strip())
    for peak in _PEAKS:
        if re.fullmatch(peak.name, model):
            return peak.tflops * 1e12 if dtype in peak.dtypes else None
    return None
