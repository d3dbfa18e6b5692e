"""The messages of all errors and warnings of the library, read from its sources."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

Message = tuple[str, str, str]  # kind, rule, the rest
CALLS = ("invalid", "_usage", "_running", "ValueError", "TypeError", "ImportError", "warn")


def all_messages(root: Path) -> dict[str, list[Message]]:
    """{module: its messages}, in the order of modules' names and of the sources; modules without any are left out."""
    folders = (root / "selfalign", root / "selfalign" / "diagnostics", root / "adapters")
    files = sorted((file for folder in folders for file in folder.glob("*.py")), key=module_of)
    trees = {module_of(file): ast.parse(file.read_text("utf-8")) for file in files}
    named = names_by_check(trees.values())
    found = {module: list(dict.fromkeys(messages(tree, named))) for module, tree in trees.items()}
    return {module: entries for module, entries in found.items() if entries}


def module_of(file: Path) -> str:
    package = {"adapters": "selfalign.adapters", "diagnostics": "selfalign.diagnostics"}.get(file.parent.name, "selfalign")
    return package if file.stem == "__init__" else f"{package}.{file.stem}"


def names_by_check(trees: Iterable[ast.Module]) -> dict[str, list[str]]:
    """{function: what it is called for}: a check gets the name of the argument that it looks at, and perhaps what to do."""
    named: dict[str, set[str]] = defaultdict(set)
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.startswith(("check_", "build")):
            what, *rest = [*node.args, *(keyword.value for keyword in node.keywords)]
            if isinstance(what, ast.Constant) and isinstance(what.value, str):
                fixes = [text(part) for part in rest if isinstance(part, (ast.Constant, ast.JoinedStr))]
                named[node.func.id].add(": ".join([what.value, *(fix for fix in fixes if " " in fix)]))
    return {function: sorted(names) for function, names in named.items()}


def messages(tree: ast.Module, named: dict[str, list[str]]) -> Iterator[Message]:
    """Every error and warning that a module can give."""
    yield from messages_in([node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))])
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name not in ("invalid", "_usage", "_running"):
            names = "; ".join(name.rstrip(".") for name in named.get(function.name, ()))
            for kind, rule, rest in messages_in([function]):
                yield kind, rule, rest + (f" Given for {names}." if names and "{" in rule else "")


def messages_in(parts: Iterable[ast.AST]) -> Iterator[Message]:
    for node in (node for part in parts for node in ast.walk(part)):
        name = getattr(getattr(node, "func", None), "attr", getattr(getattr(node, "func", None), "id", ""))
        if not isinstance(node, ast.Call) or name not in CALLS or any(isinstance(part, ast.Name) for part in node.args[:1]):
            continue  # a rule that is a name was written where it was handed over
        parts = [text(argument) for argument in node.args]
        if name in ("invalid", "_usage"):
            yield "ValueError", parts[0], f"Received: {parts[1]}. {parts[2]}"
        elif name == "_running":  # code of the user's fails inside
            yield "ValueError", parts[0], parts[1]
        elif node.args and (whole := text(node.args[0])) and "Received: " in whole:
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
    if isinstance(node, ast.BoolOp):
        return f"{text(node.values[0])} (or: {text(node.values[-1])})"
    if isinstance(node, ast.IfExp):
        return f"{text(node.body)} (or: {text(node.orelse)})"
    names = [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    return "{" + (names[-1] if isinstance(node, ast.Call) and names else names[0] if names else "value") + "}"
