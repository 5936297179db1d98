"""Backends: functions that compute the same operation, one file each, and the choice among them.

An operation is a registry that fills itself from a folder. A faster kernel is one new file in that folder: the tests in
`tests/unit/kernels` compare it with the operation's reference, and runs that can use it do, without another change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from megatron.config.sections.speedups import SpeedupsConfig, Switch
from megatron.errors import EnvironmentSetupError
from megatron.registry import Registry, is_installed

INSTALL = "Install it with `pip install -r requirements/gpu.txt`, or set the key to auto or off."
PRECISION = {"fp32": "fp32", "bf16": "bfloat16", "fp16": "fp16"}
"""Value of the key `precision` for each number format."""


@dataclass(frozen=True)
class Machine:
    """The facts of a run on which its choice of backends depends."""

    on_gpu: bool
    dtype: str
    """Number format that the model computes in: fp32, bf16 or fp16."""
    theta: str | None = None
    """Normalization of Pattention's scores; None where the model has no Pattention."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One implementation among several that compute the same, and what it needs."""

    label: str
    """Name in a run's log."""
    rank: int | None
    """Of the implementations that fit a run, the one with the highest rank is used. None is never chosen: it is there
    to be compared with."""
    key: str = ""
    """Key of the configuration (auto, on or off) that switches it. Without a key it is always auto."""
    package: str = ""
    """Optional package that it imports."""
    gpu: Literal["required", "preferred", "irrelevant"] = "irrelevant"
    """Whether it needs a GPU, or auto leaves it out on a CPU though it would run there."""
    dtypes: tuple[str, ...] = ("fp64", "fp32", "bf16", "fp16")
    """Number formats that it computes in; the tests use the first."""
    own_obstacle: Callable[[Machine], str | None] = lambda machine: None
    """What else it needs: returns the reason why it cannot run there, and the remedy, or None."""

    def obstacle(self, machine: Machine) -> str | None:
        """Returns the reason why it cannot run there, and the remedy; None when it can."""
        if machine.dtype not in self.dtypes:
            return (
                f"{self.label} computes in {' and '.join(self.dtypes)} only, and this run is in {machine.dtype}. Set "
                f"`precision: {PRECISION[self.dtypes[0]]}`, or the key to auto or off."
            )
        if self.package and not is_installed(self.package):
            return f"the package {self.package!r} is not installed. {INSTALL}"
        if self.gpu == "required" and not machine.on_gpu:
            return f"{self.package or self.label} needs a GPU, and torch sees none. Set it to auto or off."
        return self.own_obstacle(machine)

    def fits(self, machine: Machine) -> bool:
        """Tells whether `auto` uses it there."""
        return self.obstacle(machine) is None and (machine.on_gpu or self.gpu != "preferred")


C = TypeVar("C", bound=Candidate)


def choose(candidates: Iterable[C], config: SpeedupsConfig, machine: Machine) -> C:
    """Returns the candidate that is switched on, or else the highest in rank of those that fit the machine.

    Raises EnvironmentSetupError for one that is switched on and cannot run there.
    """
    switches: dict[Switch, list[C]] = {"on": [], "auto": [], "off": []}
    for candidate in sorted((c for c in candidates if c.rank is not None), key=lambda c: -(c.rank or 0)):
        switches[getattr(config, candidate.key) if candidate.key else "auto"].append(candidate)
    if not switches["on"]:
        return next(candidate for candidate in switches["auto"] if candidate.fits(machine))
    chosen = switches["on"][0]
    if obstacle := chosen.obstacle(machine):
        raise EnvironmentSetupError(f"{chosen.key}: on: {obstacle}")
    return chosen


Signature = TypeVar("Signature")


@dataclass(frozen=True, kw_only=True)
class Backend(Candidate, Generic[Signature]):
    """One implementation of an operation."""

    load: Callable[[], Signature]
    """Imports what the function needs, and returns it. Raises EnvironmentSetupError when its package is missing."""


class Operation(Registry[Backend[Signature]]):
    """The backends of one operation, by name. Each folder has a `reference`, the definition in plain torch.

    `key` is the key of the configuration that names the backend, or says auto; without one, backends have switches of
    their own.
    """

    def __init__(self, kind: str, package: str, key: str | None = None) -> None:
        super().__init__(kind, package)
        self.key = key

    def choose(self, config: SpeedupsConfig, machine: Machine) -> Backend[Signature]:
        """Returns the backend that a run uses.

        Raises EnvironmentSetupError for one that the configuration asks for and that cannot run there.
        """
        if self.key is None or getattr(config, self.key) == "auto":
            return choose((self[name] for name in self), config, machine)
        name = getattr(config, self.key)
        if obstacle := self[name].obstacle(machine):
            raise EnvironmentSetupError(f"{self.key}: {name}: {obstacle}")
        return self[name]

    def missed(self, config: SpeedupsConfig, machine: Machine) -> str | None:
        """Returns a line on the faster backend that `auto` would have taken there, and why it did not; else None."""
        if self.key is None or getattr(config, self.key) != "auto":
            return None
        chosen = self.choose(config, machine)
        for backend in sorted((self[name] for name in self), key=lambda backend: -(backend.rank or 0)):
            if (backend.rank or 0) <= (chosen.rank or 0) or (backend.gpu != "irrelevant" and not machine.on_gpu):
                continue
            return f"{self.key}: auto takes {chosen.label}, not {backend.label}: {backend.obstacle(machine)}"
        return None

    def has_choice(self) -> bool:
        """Tells whether there are several backends that a run could use."""
        return sum(self[name].rank is not None for name in self) > 1
