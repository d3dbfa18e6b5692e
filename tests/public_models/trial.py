"""What comes out for one model: attached at once, after a message, refused, or wrong."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from entry import Entry
from messages import follow
from steps import Differs, Run, captured

MESSAGES = 3  # that are followed at most


class Found(NamedTuple):
    """What came out for one model.

    Attributes:
        name: of its class.
        outcome: "at once", "after one message", "refused", or what went wrong.
        options: those that the message asked for, as they were given.
        blocks: paths of the tapped blocks.
        tokens: of a sample: those that were aligned.
        student, teacher: largest difference from the tokens taken by hand, in standard deviations.
        messages: the errors that were followed.
    """

    name: str
    outcome: str
    options: dict[str, str]
    blocks: list[str]
    tokens: int
    student: float
    teacher: float
    messages: list[str]


def attempt(entry: Entry, **options: Any) -> tuple[Run, Exception | None]:
    """One attempt, and the error that it ended in; of selfalign's warnings the first is one."""
    build = options.pop("build", entry.build)
    taps = options.get("taps", entry.taps)
    run = Run(entry._replace(build=build, taps=taps))
    run.with_call = "call" in options
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*Received: ")
            run.go(**options)
    except Exception as error:
        return run, error
    return run, None


def find(entry: Entry) -> Found:
    """What comes out for one model: attached as it is, and again as its messages say."""
    options = dict(entry.given)
    readable: dict[str, str] = {}
    messages: list[str] = []
    run, error = attempt(entry, **options)
    while is_ours(error) and len(messages) < MESSAGES:
        given, texts = follow(str(error), entry, own_width(entry))
        if not given or given.keys() <= options.keys():
            break
        messages.append(str(error))
        options |= given
        readable |= texts
        run, error = attempt(entry, **options)
    if is_ours(error):
        outcome = "refused" if entry.refused else "NO WAY OUT"
        return result(run, outcome, readable, [*messages, str(error)])
    return result(run, outcome_of(entry, error, len(messages)), readable, messages)


def outcome_of(entry: Entry, error: Exception | None, messages: int) -> str:
    """In words; in capitals, what must not be."""
    if entry.refused:
        return f"NOT REFUSED: {error}"
    if error is None:
        return ("at once", "after one message", "after two messages", "after three")[messages]
    kind = "WRONG" if isinstance(error, Differs) else f"RAW {type(error).__name__}"
    return f"{kind}: {error}"


def is_ours(error: Exception | None) -> bool:
    """Whether an error is one of selfalign's own."""
    return isinstance(error, (ValueError, TypeError)) and "Received:" in str(error)


def own_width(entry: Entry) -> int:
    """The width of the student's tokens."""
    torch.manual_seed(0)
    model = entry.build()
    model.train()
    x0, condition = entry.batch(entry.size)
    with torch.no_grad(), captured(model, entry.taps[0]) as outputs:
        entry.run(model, x0, entry.noise.draw(entry.size), condition)
    return entry.pick(outputs[0], condition).shape[-1]


def result(run: Run, outcome: str, options: dict[str, str], messages: list[str]) -> Found:
    return Found(
        run.entry.name,
        outcome,
        options,
        run.blocks,
        run.tokens,
        run.student,
        run.teacher,
        messages,
    )
