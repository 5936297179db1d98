"""Names variants without if-chains, and probes optional packages in one place.

A registry that is given a package fills itself from it: every module in that folder is one variant, called by the
module's name, and registers itself when it is imported. So a new variant is a new file, and nothing else changes.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Generic, TypeVar

from megatron.errors import EnvironmentSetupError

T = TypeVar("T")

_REGISTERED: dict[str, list[str]] = {}
"""Package of a self-filling registry -> the names registered in it so far."""


class Registry(Generic[T]):
    """Maps the names that configuration uses to the things they name; a lookup of an unknown name lists the known ones.

    With `package`, the modules of that package are imported at the first lookup, and register their variants.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, T] = {}
        self._unread_package = package

    def register(self, *names: str) -> Callable[[T], T]:
        """Returns a decorator that files its argument under `names`. Raises ValueError for a name that is taken."""

        def file(entry: T) -> T:
            for name in names:
                if name in self._entries:
                    raise ValueError(f"{self.kind} {name!r} is registered twice")
                self._entries[name] = entry
                if self.package is not None:
                    _REGISTERED.setdefault(self.package, []).append(name)
            return entry

        return file

    def unregister(self, name: str) -> None:
        """Removes a variant, as a test does with its own. Raises KeyError for an unknown name."""
        del self._entries[name]
        if self.package is not None:
            _REGISTERED[self.package].remove(name)

    def __getitem__(self, name: str) -> T:
        try:
            return self._all()[name]
        except KeyError:
            raise KeyError(f"unknown {self.kind} {name!r}; known: {', '.join(sorted(self._entries))}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._all()) if self.package is not None else self._entries)

    def _all(self) -> dict[str, T]:
        # Forgotten first: a module of the package may look another variant up while it is imported.
        package, self._unread_package = self._unread_package, None
        if package is not None:
            for name in _module_names(package):
                importlib.import_module(f"{package}.{name}")
        return self._entries


def variant_names(package: str) -> list[str]:
    """Lists the variants that the modules of `package` define, without importing any of them.

    So configuration knows the names of what needs torch, and does not load it. Variants that were registered from
    elsewhere, as by a test, are listed too.
    """
    return sorted({*_module_names(package), *_REGISTERED.get(package, ())})


def _module_names(package: str) -> list[str]:
    return [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]


def is_installed(package: str) -> bool:
    """Tells whether `package` can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package around a dotted name
        return False


def install_extra(name: str) -> str:
    """Returns how to install the packages of one of pyproject.toml's extras, for `require`."""
    return f"Install it with `pip install -e '.[{name}]' -c requirements/constraints.txt`."


def require(package: str, wanted_by: str, how_to_get_it: str) -> ModuleType:
    """Imports an optional package that the configuration asks for.

    Raises EnvironmentSetupError, naming who wants it and how to install it, when it is missing.
    """
    if not is_installed(package):
        raise EnvironmentSetupError(
            f"{wanted_by} needs the package {package!r}, which is not installed. {how_to_get_it}"
        )
    return importlib.import_module(package)
