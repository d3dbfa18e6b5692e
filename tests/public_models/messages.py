"""Following an error's message as it stands."""

from __future__ import annotations

import ast
import re
from typing import Any

import torch
from entry import Entry

OPTIONS = ("select", "blocks", "taps", "width", "call")
WITHOUT = "without dropping"  # an answer: builds the model so


def follow(text: str, entry: Entry, width: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The options that an error asks for, and how they read.

    The first option that it names and that can be answered: with an expression that the message
    gives, with a path that it lists, or with what a user knows of the model.
    """
    fix = text.partition("Received:")[2] or text
    named = re.findall(rf"\b({'|'.join(OPTIONS)})=", fix)
    for name in dict.fromkeys(named):
        if name in entry.answers:
            value = entry.answers[name]
            listed = name != "blocks" or all(repr(path) in text for path in listed_paths(value))
            if listed:
                return {name: value}, {name: readable(value)}
        if name == "select" and (code := expression(fix)):
            return {name: eval(code, {"torch": torch})}, {name: code}
        if name == "width":
            return {name: width}, {name: str(width)}
        if name == "taps":
            taps = offered_taps(fix) or entry.taps
            return {name: taps}, {name: readable(taps)}
        if name == "call":
            return {name: entry.run}, {name: ""}
    if re.search("own (dropping|drawing) off", fix) and WITHOUT in entry.answers:
        return {"build": entry.answers[WITHOUT]}, {"the model's own dropping off": ""}
    return {}, {}


def listed_paths(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def readable(value: Any) -> str:
    return "a function of the user's" if callable(value) else repr(value)


def expression(text: str) -> str:
    """The function that a message offers for select=, the longest text that is one."""
    _, _, rest = text.partition("select=lambda")
    for end in range(len(rest), 0, -1):
        code = f"lambda{rest[:end]}".rstrip(" .,")
        try:
            ast.parse(code, mode="eval")
        except SyntaxError:
            continue
        return code if rest else ""
    return ""


def offered_taps(text: str) -> tuple[str, ...]:
    """The two paths that a message offers for taps=."""
    found = re.search(r"taps=\('([\w.]+)', '([\w.]+)'\)", text)
    return found.groups() if found else ()
