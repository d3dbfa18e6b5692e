"""The messages of all errors and warnings of the library, read from its sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

Message = tuple[str, str, str]  # kind, rule, the rest


def all_messages(root: Path) -> dict[str, list[Message]]:
    """{module: its messages}, in the order of modules' names and of the sources; modules without any are left out."""
    files = sorted([*(root / "selfalign").glob("*.py"), *(root / "adapters").glob("*.py")], key=module_of)
    found = {module_of(file): list(dict.fromkeys(messages(ast.parse(file.read_text("utf-8"))))) for file in files}
    return {module: entries for module, entries in found.items() if entries}


def module_of(file: Path) -> str:
    package = "selfalign.adapters" if file.parent.name == "adapters" else "selfalign"
    return package if file.stem == "__init__" else f"{package}.{file.stem}"


def messages(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """(kind, rule, the rest) of every error and warning that a module can give."""
    for node in ast.walk(tree):
        name = getattr(getattr(node, "func", None), "attr", getattr(getattr(node, "func", None), "id", ""))
        if not isinstance(node, ast.Call) or name not in ("invalid", "ValueError", "TypeError", "ImportError", "warn"):
            continue
        if name == "invalid":
            rule, received, fix = (text(argument) for argument in node.args)
            yield "ValueError", rule, f"Received: {received}. {fix}"
        elif node.args and (whole := text(node.args[0])) and " " in whole and "Received: " in whole:
            rule, _, rest = whole.partition(" Received: ")
            yield {"warn": "warning"}.get(name, name), rule.rstrip("."), f"Received: {rest}"


def text(node: ast.expr) -> str:
    """A message as text; what is known only when it happens stands as its name in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text(node.value)
    if isinstance(node, ast.BinOp):
        return text(node.left) + text(node.right)
    if isinstance(node, ast.IfExp):
        return f"{text(node.body)} (or: {text(node.orelse)})"
    names = [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    return "{" + (names[-1] if isinstance(node, ast.Call) and names else names[0] if names else "value") + "}"
