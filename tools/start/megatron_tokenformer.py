"""Starts the tools of this checkout, after a look at the packages that they are about to import.

Our package is called `megatron`, as are NVIDIA's and GPT-NeoX's, and many projects have a folder `tools`. The scripts
of the top level find their neighbours first. A script in tools/ finds what comes first on Python's path, where an
editable install of this project stands last; so it imports this module, whose name nobody else has, before those
packages. This folder is on the path of the install for that reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn


def run_tool(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Runs `main` on the words of the command line, and exits with the code that it returns."""
    from megatron.errors import exit_on_user_error

    exit_on_user_error(lambda: main(sys.argv[1:]))


def _checkout() -> Path:
    """Returns the folder of the checkout whose tool is running, or else of this file's."""
    module = Path(__file__).resolve()
    script = Path(sys.argv[0]).resolve()
    tools = (folder for folder in script.parents if folder.name == "tools")
    return next((folder.parent for folder in tools if (folder / "start" / module.name).is_file()), module.parents[2])


def _refuse_foreign(package: str, checkout: Path) -> None:
    """Exits when an import of `package` would find another one than the checkout's."""
    spec = find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places or Path(places[0]).resolve() == checkout / package:
        return
    folder = Path(places[0]).resolve().parent
    owners = packages_distributions().get(package)
    if (folder / "tools" / "start" / Path(__file__).name).is_file():
        remedy = "It is another checkout's: install this one (pip install -e . -c requirements/constraints.txt)"
    elif owners:
        remedy = f"It is that of {owners[0]}: uninstall it (pip uninstall {owners[0]})"
    else:
        remedy = f"Take {folder} off Python's path (PYTHONPATH)"
    sys.exit(
        f"EnvironmentSetupError: `{package}` is {folder / package}, not {checkout / package}. {remedy}, or give this "
        "project an environment of its own, as `make` does."
    )


for _package in ("megatron", "tools"):
    _refuse_foreign(_package, _checkout())
