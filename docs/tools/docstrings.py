"""A griffe extension: this project's docstrings say "Example:" and "Reference:", griffe's Google style knows "Examples:"."""

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    """Rewrites the two sections of every docstring into what griffe and Markdown take."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    text = re.sub(r"^Example:\n(?=    >>> )", "Examples:\n", text, flags=re.M)
    text = re.sub(r"^(    )([*\w]+(?:, [*\w]+)+): (.*\n(?:     .*\n)*)", each, text, flags=re.M)
    return re.sub(r"^(Reference|Example): (?=\S)", r"**\1.** ", text, flags=re.M)


def each(entry: re.Match[str]) -> str:
    """`a, b: what both are` as two entries."""
    return "".join(f"{entry[1]}{name}: {entry[3]}" for name in entry[2].split(", "))
