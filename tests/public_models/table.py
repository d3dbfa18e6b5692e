"""The results, kept in a file, and the tables of docs/models.md that are made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absent import ABSENT

RESULTS = Path(__file__).resolve().parent / "results.json"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
GOOD = ("at once", "after one message", "refused")
TITLES = ("model", "attached", "tokens", "student", "teacher", "what is special")

Row = dict[str, Any]


def row_of(entry: Any, found: Any) -> Row:
    """What is kept of one model."""
    return {
        "name": entry.name,
        "repository": entry.repository.name if entry.repository else "diffusers",
        "commit": entry.repository.commit if entry.repository else "",
        "outcome": found.outcome,
        "options": found.options,
        "blocks": found.blocks,
        "tokens": found.tokens,
        "student": float(f"{found.student:.0e}"),
        "teacher": float(f"{found.teacher:.0e}"),
        "note": entry.refused or entry.note,
    }


def load() -> list[Row]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def keep(row: Row) -> None:
    """Put one row into the file, in the place of an older one."""
    others = [old for old in load() if old["name"] != row["name"]]
    rows = sorted([*others, row], key=lambda kept: (kept["repository"], kept["name"]))
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def keep_only(names: set[str]) -> None:
    """Drop the rows of models that are not tried any more."""
    rows = [row for row in load() if row["name"] in names]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def write() -> None:
    """The page's two tables anew."""
    text = PAGE.read_text()
    for mark, lines in tables().items():
        head, rest = text.split(f"<!-- {mark} -->\n")
        _, tail = rest.split("<!-- end -->\n", maxsplit=1)
        text = f"{head}<!-- {mark} -->\n" + "\n".join(lines) + f"\n<!-- end -->\n{tail}"
    PAGE.write_text(text)


def tables() -> dict[str, list[str]]:
    """The lines of each table, by its mark."""
    rows = load()
    own = [row for row in rows if row["repository"] == "diffusers"]
    public = [row for row in rows if row["repository"] != "diffusers"]
    return {"diffusers": list(_own_lines(own)), "public": list(_public_lines(public))}


def _own_lines(rows: list[Row]) -> Iterator[str]:
    yield f"| {' | '.join(TITLES)} |"
    yield "| --- |" + " --- |" * (len(TITLES) - 1)
    named = {row["name"]: _line(f"`{row['name']}`", row) for row in rows}
    named |= {name: f"| `{name}` | not tried | | | | {why} |" for name, why in ABSENT.items()}
    for name in sorted(named):
        yield named[name]


def _public_lines(rows: list[Row]) -> Iterator[str]:
    yield f"| {' | '.join(TITLES)} |"
    yield "| --- |" + " --- |" * (len(TITLES) - 1)
    for row in sorted(rows, key=lambda row: row["repository"].lower()):
        url = f"https://github.com/{row['repository']}/tree/{row['commit']}"
        yield _line(f"[{row['repository']}]({url}): {row['name']}", row)


def _line(name: str, row: Row) -> str:
    attached = row["outcome"]
    if row["options"]:
        attached += ": " + ", ".join(_option(*option) for option in row["options"].items())
    if attached.startswith("refused"):
        return f"| {name} | {row['outcome']} | | | | {row['note']} |"
    sides = f"{row['student']:.0e} | {row['teacher']:.0e}".replace("0e+00", "0")
    return f"| {name} | {attached} | {row['tokens']} | {sides} | {row['note']} |"


def _option(name: str, text: str) -> str:
    """As it is written in a call; `call=` is the model's own call, in its entry."""
    return name if " " in name else f"`{name}={text}`"
