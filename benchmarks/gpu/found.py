"""What a part of `make gpu` found: written line by line, so that a cut-off keeps what was done."""

import argparse
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Figures = dict[str, Any]


class Options(NamedTuple):
    """Of a part's command line."""

    out: Path  # the file of JSON lines
    short: bool  # a rehearsal: smallest sizes, on whatever device there is


def command_line(description: str | None) -> argparse.ArgumentParser:
    """The options that every part has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--short", action="store_true")
    return parser


def parse(description: str | None) -> Options:
    return Options(**vars(command_line(description).parse_args()))


def write(out: Path, name: str, **figures: Any) -> None:
    """One line of a part's file."""
    with out.open("a") as file:
        file.write(json.dumps({"name": name} | figures) + "\n")


def attempt(out: Path, name: str, measure: Callable[[], Figures]) -> Figures:
    """Write what `measure` returns. An error is a result, too, and the next check goes on."""
    start = time.monotonic()
    try:
        figures = measure()
    except Exception as error:
        last = traceback.format_exc().strip().splitlines()[-6:]
        figures = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600], "where": last}
    write(out, name, **figures, seconds=round(time.monotonic() - start, 1))
    return figures


def judge(out: Path, name: str, value: float | None, at_most: float, on_a_gpu: bool) -> None:
    """Write a target. Elsewhere than on a GPU the figure is no verdict; None: not measured."""
    if value is not None:
        ok = value <= at_most or not on_a_gpu
        write(out, name, ok=ok, value=value, at_most=at_most, judged=on_a_gpu)


def read(out: Path) -> list[Figures]:
    """The lines of a part's file; a last line that was cut off is left out."""
    if not out.exists():
        return []
    lines = out.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
