"""A report as text: plain values as aligned lines, then the tables."""

from __future__ import annotations

from typing import Any, TypeAlias, TypeGuard

Row: TypeAlias = dict[str, Any]
"""One line of a table, by the names of its columns."""

Report: TypeAlias = dict[str, Any]
"""What a command found: plain values, and tables (lists of rows), by their names."""


def text_of(report: Report) -> str:
    """The report as people read it.

    Example:
        >>> from selfalign.cli.output import text_of
        >>> print(text_of({"depth": 12, "blocks": [{"list": "blocks", "count": 12}]}))
        depth  12
        <BLANKLINE>
        list    count
        blocks  12
    """
    facts = []
    tables = []
    for name, value in report.items():
        if _is_table(value):
            tables.append(_table(value))
        else:
            facts.append([name.replace("_", " "), _shown(value)])
    parts = [_aligned(facts)] if facts else []
    return "\n\n".join([*parts, *tables])


def _is_table(value: object) -> TypeGuard[list[Row]]:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _table(rows: list[Row]) -> str:
    lines = [[_shown(value) for value in row.values()] for row in rows]
    return _aligned([list(rows[0]), *lines])


def _aligned(lines: list[list[str]]) -> str:
    """Columns of equal width, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _shown(value: object) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
