"""The messages of all errors and warnings of the library, read from its sources."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

Message = tuple[str, str, str]  # kind, rule, the rest
Named = Mapping[str, list[str]]  # what a function is called for, by the function's name
Values = Mapping[str, list[ast.expr]]  # what a function assigns, by the variable's name

BUILDERS = ("invalid", "wrong_usage", "running")  # (rule, received, fix); the last (rule, fix)
ERRORS = ("ValueError", "TypeError", "ImportError")
CALLS = (*BUILDERS, *ERRORS, "warn")
FOLDERS = {"selfalign": "selfalign", "adapters": "selfalign.adapters"}


def all_messages(root: Path) -> dict[str, list[Message]]:
    """{module: its messages}, in the order of modules' names and of the sources.

    Modules without any are left out.
    """
    trees = {}
    for folder in FOLDERS:
        for file in (root / folder).rglob("*.py"):
            trees[module_of(root, file)] = ast.parse(file.read_text("utf-8"))
    named = names_by_check(trees.values())
    found = {}
    for module in sorted(trees):
        entries = list(dict.fromkeys(messages(trees[module], named)))
        if entries:
            found[module] = entries
    return found


def module_of(root: Path, file: Path) -> str:
    """The name under which a source file is imported."""
    folder, *rest = file.relative_to(root).with_suffix("").parts
    parts = [FOLDERS[folder], *rest]
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def names_by_check(trees: Iterable[ast.Module]) -> dict[str, list[str]]:
    """{function: what it is called for}.

    A check gets the name of the argument that it looks at, and perhaps what to do.
    """
    named: dict[str, set[str]] = defaultdict(set)
    for node in (node for tree in trees for node in ast.walk(tree)):
        if not isinstance(node, ast.Call) or not called(node).startswith("check_"):
            continue
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        words = [text(part) for part in given if isinstance(part, (ast.Constant, ast.JoinedStr))]
        first = node.args[0] if node.args else None
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            fixes = [word for word in words[1:] if " " in word]
            named[called(node)].add(": ".join([first.value, *fixes]))
    return {function: sorted(names) for function, names in named.items()}


def messages(tree: ast.Module, named: Named) -> Iterator[Message]:
    """Every error and warning that a module can give."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {part for function in functions for part in ast.walk(function)}
    yield from messages_in((node for node in ast.walk(tree) if node not in inside), {})
    for function in functions:
        if function.name in BUILDERS:
            continue
        names = "; ".join(name.rstrip(".") for name in named.get(function.name, ()))
        for kind, rule, rest in messages_in(ast.walk(function), assigned(function)):
            given_for = f" Given for {names}." if names and "{" in rule else ""
            yield kind, rule, rest + given_for


def messages_in(nodes: Iterable[ast.AST], values: Values) -> Iterator[Message]:
    """The messages that some nodes of a tree make."""
    for node in nodes:
        if not isinstance(node, ast.Call) or called(node) not in CALLS or not node.args:
            continue
        name = called(node)
        rule, *rest = [text(argument, values) for argument in node.args]
        if name == "running":  # code of the user's fails inside
            yield "ValueError", rule, rest[0]
        elif name in BUILDERS:
            yield "ValueError", rule, f"Received: {rest[0]}. {rest[1]}"
        elif "Received: " in rule:
            rule, _, received = rule.partition(" Received: ")
            kind = "warning" if name == "warn" else name
            yield kind, rule.rstrip("."), f"Received: {received}"


def called(node: ast.Call) -> str:
    """The name of the function that a call calls."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def assigned(function: ast.FunctionDef) -> dict[str, list[ast.expr]]:
    """Texts that a function puts together before it raises: what it assigns, by name."""
    values: dict[str, list[ast.expr]] = defaultdict(list)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id].append(node.value)
    return {name: given for name, given in values.items() if all(map(is_text, given))}


def is_text(node: ast.expr) -> bool:
    """Whether an expression is a text for sure."""
    if isinstance(node, ast.IfExp):
        return is_text(node.body) and is_text(node.orelse)
    whole = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return whole or isinstance(node, ast.JoinedStr)


def text(node: ast.expr, values: Values | None = None) -> str:
    """A message as text; what is known only when it happens stands as its name in braces."""
    values = values or {}
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part, values) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text(node.value, values)
    if isinstance(node, ast.BinOp):
        return text(node.left, values) + text(node.right, values)
    if isinstance(node, ast.BoolOp):
        return either(node.values[0], node.values[-1], values)
    if isinstance(node, ast.IfExp):
        return either(node.body, node.orelse, values)
    if isinstance(node, ast.Name) and node.id in values:
        others = {name: given for name, given in values.items() if name != node.id}
        return or_else(text(given, others) for given in values[node.id])
    return in_braces(node)


def either(first: ast.expr, second: ast.expr, values: Values) -> str:
    """Two texts of which one is taken."""
    return or_else([text(first, values), text(second, values)])


def or_else(texts: Iterable[str]) -> str:
    """Texts of which one is taken; an empty one is left out."""
    first, *others = [found for found in texts if found] or [""]
    return first + "".join(f" (or: {other})" for other in others)


def in_braces(node: ast.expr) -> str:
    """A value by the name that tells most: what a call is made on, else the first."""
    names = [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    if not names:
        return "{value}"
    return f"{{{names[-1] if isinstance(node, ast.Call) else names[0]}}}"
