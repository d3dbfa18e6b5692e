"""Errors of the command line: wrong usage, and code of the user's that fails."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

from selfalign.adapting import invalid


class WrongUsage(Exception):
    """What the command line asks for does not exist or does not fit: exit code 2."""


def wrong_usage(rule: str, received: object, fix: str) -> WrongUsage:
    """The error of a wrong usage, in the three parts of every error here."""
    return WrongUsage(str(invalid(rule, received, fix)))


@contextlib.contextmanager
def running(rule: str, fix: str) -> Iterator[None]:
    """Code of the user's runs inside: its error comes with its place, under our rule.

    Raises:
        ValueError: the code inside failed, or ended the process.
    """
    try:
        yield
    except WrongUsage:
        raise
    except (Exception, SystemExit) as error:  # a script may end itself
        place = traceback.extract_tb(error.__traceback__)[-1]
        received = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        raise invalid(rule, received, fix) from error
