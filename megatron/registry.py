"""Named variants without if-chains, and the one place where optional packages are probed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Generic, TypeVar

from megatron.errors import EnvironmentSetupError

T = TypeVar("T")


class Registry(Generic[T]):
    """A read-mostly map from the names that configuration uses to the things they name.

    Filled at import time by `register`; looking up an unknown name lists the known ones.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator that files its argument under each of `names`. Raises ValueError on a name taken twice."""

        def file(entry: T) -> T:
            for name in names:
                if name in self._entries:
                    raise ValueError(f"{self.kind} {name!r} is registered twice")
                self._entries[name] = entry
            return entry

        return file

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            raise KeyError(f"unknown {self.kind} {name!r}; known: {', '.join(sorted(self._entries))}") from None

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


def is_installed(package: str) -> bool:
    """Whether `package` can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package around a dotted name
        return False


def require(package: str, wanted_by: str, how_to_get_it: str) -> ModuleType:
    """Import an optional package that the configuration asks for.

    Raises EnvironmentSetupError, naming who wants it and how to install it, when it is missing.
    """
    if not is_installed(package):
        raise EnvironmentSetupError(
            f"{wanted_by} needs the package {package!r}, which is not installed. {how_to_get_it}"
        )
    return importlib.import_module(package)
