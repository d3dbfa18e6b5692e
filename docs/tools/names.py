"""The public names of the library, read from its sources, and which of them the reference has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ADAPTERS = {"torch": ("SelfAlignment", "Projector", "features"), "keras": ("SelfAligned",)}  # jax says so itself, in __all__
COMMANDS = ("cli",)  # no functions to call: docs/cli.md


def missing(root: Path) -> list[str]:
    """What is wrong: public names without a docstring or an example in it, or without a place in docs/reference/."""
    pages = "\n".join(page.read_text("utf-8") for page in sorted((root / "docs" / "reference").glob("*.md")))
    placed = set(re.findall(r"^::: (\S+)$", pages, re.M))
    wrong = []
    for name, docstring in public(root):
        if not docstring:
            wrong.append(f"{name} has no docstring")
        elif "Example" not in docstring:
            wrong.append(f"{name} has no example")
        if name not in placed:
            wrong.append(f"{name} is not in docs/reference/")
    return wrong


def public(root: Path) -> Iterator[tuple[str, str]]:
    """(full name, docstring) of every public function and class."""
    core = root / "selfalign"
    for file in sorted([*core.glob("[!_]*.py"), *core.glob("diagnostics/[!_]*.py")]):
        if file.stem in COMMANDS:
            continue
        module = ".".join(file.relative_to(root).with_suffix("").parts)
        for name, node in definitions(file).items():
            if not name.startswith("_"):
                yield f"{module}.{name}", ast.get_docstring(node) or ""
    for file in sorted((root / "adapters").glob("[!_]*.py")):
        files = [*sorted(file.parent.glob(f"_{file.stem}_*.py")), file]
        found = {name: (part.stem, node) for part in files for name, node in definitions(part).items()}
        for name in ADAPTERS.get(file.stem) or exported(file):
            module, node = found[name]
            yield f"selfalign.adapters.{module}.{name}", ast.get_docstring(node) or ""


def definitions(file: Path) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    body = ast.parse(file.read_text("utf-8")).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def exported(file: Path) -> list[str]:
    """The names in a module's __all__."""
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    return []
