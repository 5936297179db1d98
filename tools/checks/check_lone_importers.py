"""Checks that each module with a single importer has a reason to be a file of its own.

    python tools/checks/check_lone_importers.py            fail on a module without a reason, and on a stale reason
    python tools/checks/check_lone_importers.py --list     show all of them with their reasons, and end with 0

Modules of megatron/ count, and as importers megatron/, tools/ and the scripts beside them; tests do not. Left out are a
registered variant, which its registry finds in its folder; a module that is run; and one that a tool or a script calls,
which is that command's entry into the library. A module without importers is dead, or has a reason as well. The reasons
stand in lone_importers.toml.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_tokenformer import run_tool

import grimp

from tools.command_line import tool_parser

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron"
REASONS = Path(__file__).with_name("lone_importers.toml")


def main(argv: Sequence[str]) -> int:
    """Prints the modules without a reason and the stale reasons; returns 1 when there are any, with --list always 0."""
    parser = tool_parser(__doc__)
    parser.add_argument("--list", action="store_true", help="show every module with at most one importer")
    options = parser.parse_args(argv)
    lone = lone_modules(importers_of(ROOT, PACKAGE))
    reasons: dict[str, str] = tomllib.loads(REASONS.read_text("utf-8"))["reasons"]
    if options.list:
        for module, importers in lone.items():
            print(f"{module} <- {' '.join(importers) or 'nobody'}: {reasons.get(module, '-')}")
        return 0
    problems = list(missing_and_stale(lone, reasons))
    print("\n".join(problems) if problems else f"{len(lone)} modules with a single importer, each with its reason")
    return int(bool(problems))


def lone_modules(importers: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Selects the modules with at most one importer, unless that is a file outside of the package."""
    return {
        module: users
        for module, users in importers.items()
        if len(users) < 2 and not any(user.endswith(".py") for user in users)
    }


def missing_and_stale(lone: Mapping[str, Sequence[str]], reasons: Mapping[str, str]) -> Iterator[str]:
    """Yields a line for each lone module without a reason, and for each reason without such a module."""
    for module, importers in lone.items():
        if not reasons.get(module):
            importer = " ".join(importers) or "nobody"
            yield f"{module}: imported by {importer} alone; join them, or say why not in {REASONS.name}"
    for module in sorted(set(reasons) - set(lone)):
        yield f"{module}: stale in {REASONS.name}; it is gone, or has several importers"


def importers_of(root: Path, package: str) -> dict[str, list[str]]:
    """Returns the importers of each module of `package` below `root`, by their names, or paths outside of it.

    Packages, registered variants and modules that are run are left out.
    """
    graph = grimp.build_graph(package, cache_dir=None)
    outside = {file: imported_names(parsed(file)) for file in [*root.glob("tools/**/*.py"), *root.glob("*.py")]}
    trees = {module: parsed(file) for module in graph.modules if (file := module_file(root, module)).is_file()}
    folders = {folder for tree in trees.values() for folder in variant_folders(tree, package)}
    return {
        module: sorted(graph.find_modules_that_directly_import(module))
        + [str(file.relative_to(root)) for file, names in outside.items() if module in names]
        for module in sorted(trees)
        if module.rpartition(".")[0] not in folders and not is_run(trees[module])
    }


def module_file(root: Path, module: str) -> Path:
    """Returns where a module lies, if it is no package."""
    return root.joinpath(*module.split(".")).with_suffix(".py")


def parsed(file: Path) -> ast.Module:
    """Parses a file of Python."""
    return ast.parse(file.read_text("utf-8"))


def imported_names(tree: ast.Module) -> set[str]:
    """Returns the dotted names that a file imports: of modules, and of what it takes from them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def variant_folders(tree: ast.Module, package: str) -> Iterator[str]:
    """Yields the packages that registries fill themselves from: `Registry(kind, package="...")` and its like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "package" and isinstance(node.value, ast.Constant):
            folder = str(node.value.value)
            if folder.startswith(f"{package}."):
                yield folder


def is_run(tree: ast.Module) -> bool:
    """Tells whether a module has a block for when it is run: `if __name__ == "__main__"`."""
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)


if __name__ == "__main__":
    run_tool(main)
