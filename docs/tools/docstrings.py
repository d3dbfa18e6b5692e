"""A griffe extension that reads this project's docstrings.

They say "Example:" and "Reference:", where griffe's Google style knows "Examples:".
"""

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    """Rewrites the two sections of every docstring into what griffe and Markdown take."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Griffe's call for each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    """A docstring in griffe's words."""
    text = re.sub(r"^Example:\n(?=    >>> )", "Examples:\n", text, flags=re.M)
    several = r"^(    )([*\w]+(?:, [*\w]+)+): (.*\n(?:     .*\n)*)"
    text = re.sub(several, each, text, flags=re.M)
    return re.sub(r"^(Reference|Example): (?=\S)", r"**\1.** ", text, flags=re.M)


def each(entry: re.Match[str]) -> str:
    """`a, b: what both are` as two entries."""
    return "".join(f"{entry[1]}{name}: {entry[3]}" for name in entry[2].split(", "))
