"""Starts the tools of this checkout, after a look at the packages that they are about to import.

Our package is called `megatron`, as are NVIDIA's and GPT-NeoX's, and many projects have a folder `tools`. The scripts
of the top level find their neighbours first. A script in tools/ finds what comes first on Python's path, where an
editable install of this project stands last; so it imports this module, whose name nobody else has, before those
packages. This folder is on the path of the install for that reason.

What a tool imports takes seconds. Ctrl-C ends it in that time too, in one line.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn


def run_tool(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Runs `main` on the words of the command line, and exits with the code that it returns."""
    from megatron.errors import exit_on_user_error

    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    exit_on_user_error(lambda: main(sys.argv[1:]))


def _running_tools_checkout() -> Path | None:
    """Returns the folder of the checkout whose tool is running; None in any other program."""
    folders = (folder for folder in Path(sys.argv[0]).resolve().parents if folder.name == "tools")
    return next((folder.parent for folder in folders if (folder / "start" / Path(__file__).name).is_file()), None)


def _end_at_once(number: int, frame: object) -> NoReturn:
    """Ends a tool that still imports: an interrupt of an import may surface as any error, or not at all."""
    os.write(2, b"interrupted\n")
    os._exit(130)


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


_checkout = _running_tools_checkout()
if _checkout is not None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end_at_once)
for _package in ("megatron", "tools"):
    _refuse_foreign(_package, _checkout or Path(__file__).resolve().parents[2])
