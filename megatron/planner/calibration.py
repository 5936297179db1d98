"""Measurements of `--calibrate`: one file for each kind of device, in the user's cache."""

from __future__ import annotations

import json
import re
import socket
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron.errors import EnvironmentSetupError, os_errors_as
from megatron.io.durable import replace_durably
from megatron.io.json_files import read_json_object
from megatron.io.user_cache import user_cache
from megatron.planner.devices import CPU, Device
from megatron.planner.rates import CPU_NETWORK, LINK_ATTAINED, Curve, Rates

FOLDER = "calibration"
VERSION = 1
MOST = 1e30
"""Rates from here on are none."""


@dataclass(frozen=True)
class NumberFormat:
    """Rates that depend on the number format of weights and activations."""

    products: list[list[float]]
    """Matrix products: [FLOP of one, FLOP/s]."""
    attention: float
    """Fused causal attention [FLOP/s of the pairs that are not masked]."""


@dataclass(frozen=True)
class Calibration:
    """Rates of one rank, measured while `ranks` of a machine worked at the same time."""

    device: str
    """Name of the device on the command line."""
    host: str
    date: str
    ranks: int
    """Ranks of a machine that worked at the same time."""
    memory: float
    """Memory of the device [bytes]."""
    formats: dict[str, NumberFormat]
    passes: list[list[float]]
    """Passes over tensors by plain operations: [bytes of one, bytes/s]."""
    functions: float
    """GeLUs beyond their bytes [1/s]."""
    link: float | None
    """All-reduce within a machine, what each link carries [bytes/s]; None for one rank alone."""
    network: float | None
    """The same between machines, for each rank of a machine [bytes/s]; None for one machine alone."""
    latency: float | None
    """The smallest all-reduce [s]; None for one rank alone."""
    load: float
    """Load of the machine before it was measured."""
    format_read: str = ""
    """Number format whose rates `rates` returns."""

    def rates(self, per_machine: int, device: Device | None) -> Rates:
        """Returns the rates of a rank where `per_machine` of them share a machine.

        On a CPU, ranks beyond those that were measured share what there is; a GPU is a rank's own.
        """
        chosen = self.formats[self.format_read]
        share = min(1.0, self.ranks / per_machine) if self.device == CPU else 1.0
        assumptions = [f"rates of --calibrate on {self.host}, {self.date}, {self.ranks} ranks, load {self.load:.1f}"]
        if share < 1.0:
            assumptions.append(f"{per_machine} ranks share what {self.ranks} had when it was measured")
        elsewhere = CPU_NETWORK if device is None else device.link * 1e9 * LINK_ATTAINED
        far = CPU_NETWORK / 10 if device is None else device.network * 1e9 * LINK_ATTAINED
        if self.link is None:
            assumptions.append(f"collectives at {elsewhere / 1e9:g} GB/s in a machine: one rank alone measured none")
        if self.network is None:
            assumptions.append(f"collectives at {far / 1e9:g} GB/s a device between machines: nothing measured it")
        return Rates(
            products=Curve(tuple((size, rate * share) for size, rate in chosen.products)),
            attention=chosen.attention * share,
            passes=Curve(tuple((size, rate * share) for size, rate in self.passes)),
            functions=self.functions * share if self.device == CPU else None,
            link=self.link or elsewhere,
            network=self.network or far,
            latency=self.latency or (1e-3 if self.device == CPU else 20e-6),
            watts=None if device is None else device.watts,
            source=f"measured on {self.host}, {self.date}",
            assumptions=tuple(assumptions),
        )


def calibration_file(device: str) -> Path | None:
    """Returns the file for a device; None where there is no place for it. A processor's is its machine's own."""
    cache = user_cache()
    name = f"{CPU}-{socket.gethostname()}" if device == CPU else device
    return None if cache is None else cache / FOLDER / f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}.json"


def write_calibration(measured: Calibration) -> Path:
    """Writes a device's file, whole or not at all; formats that were measured before stay. Returns its path.

    Raises EnvironmentSetupError where it cannot be written.
    """
    file = calibration_file(measured.device)
    if file is None:
        raise EnvironmentSetupError("there is no home folder to keep the calibration in; set XDG_CACHE_HOME to one.")
    before = _read(file)
    if before is not None and before.ranks == measured.ranks and before.host == measured.host:
        measured = replace(measured, formats=before.formats | measured.formats)
    with os_errors_as(EnvironmentSetupError, str(file)):
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {name: value for name, value in asdict(measured).items() if name != "format_read"}
        replace_durably(file, json.dumps({"version": VERSION, **content}, indent=1) + "\n")
    return file


def find_calibration(device: str, dtype: str) -> Calibration | None:
    """Returns what was measured of a device in a number format; None without, and for a file that is not one of ours.

    A damaged file counts as none: what it held can be measured again.
    """
    file = calibration_file(device)
    found = None if file is None else _read(file)
    if found is None or dtype not in found.formats or found.device != device:
        return None
    return replace(found, format_read=dtype)


def _read(file: Path) -> Calibration | None:
    try:
        return _parsed(read_json_object(file, max_bytes=1 << 20))
    except (OSError, ValueError):
        return None


def _parsed(content: dict[str, Any]) -> Calibration:
    """Returns the calibration that a file holds. Raises ValueError for anything else."""
    if content.pop("version", None) != VERSION:
        raise ValueError("of another version")
    try:
        formats = {str(name): NumberFormat(**one) for name, one in content.pop("formats").items()}
        found = Calibration(formats=formats, **content)
        rates = [found.ranks, found.memory, found.functions, *(one.attention for one in formats.values())]
        rates += [value for value in (found.link, found.network, found.latency) if value is not None]
        curves = [found.passes, *(one.products for one in formats.values())]
        ordered = all(curve and curve == sorted(curve) and all(len(p) == 2 for p in curve) for curve in curves)
        rates += [number for curve in curves for point in curve for number in point]
        positive = all(isinstance(rate, int | float) and 0 < rate < MOST for rate in rates)
        words = all(isinstance(word, str) for word in (found.device, found.host, found.date))
        if not (ordered and positive and words and isinstance(found.load, int | float)):
            raise ValueError("no calibration")
        return found
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError("no calibration") from error
