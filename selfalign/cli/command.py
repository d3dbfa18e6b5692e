"""The command `selfalign`: its parser, and how it ends.

A command fills its report, a dict of plain values and of tables. `main` prints it, also where a
problem cut it short. Frameworks are imported by the commands that need them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Callable

from selfalign import __version__

from . import options
from .check import check_model
from .installed import show_installed
from .output import Report, text_of
from .presets import show_presets
from .usage import WrongUsage

Command = Callable[[argparse.Namespace, Report], None]

COMMANDS: dict[str, tuple[Command, str, str]] = {
    "presets": (show_presets, "Show the named models, and what the recipes set.", options.PRESETS),
    "info": (show_installed, "Show versions, devices, and which adapters work.", options.INFO),
    "check": (
        check_model,
        "Attach SRA to a model of yours, and run a few training steps.",
        options.CHECK,
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return its exit code.

    0: fine. 1: a problem was found. 2: wrong usage. 130: interrupted.

    Args:
        arguments: as on the command line, which is the default.

    Raises:
        SystemExit: of argparse, after --help and --version (0), and where it cannot read the
            arguments (2).

    Example:
        >>> from selfalign.cli import main
        >>> code = main(["presets", "--recipe", "default"])
        model     depth  student_layer  teacher_layer  path
        SiT-S/2   12     3              8              linear
        SiT-B/2   12     3              8              linear
        SiT-L/2   24     6              16             linear
        SiT-XL/2  28     8              20             linear
        DiT-S/2   12     3              7              discrete
        DiT-B/2   12     3              7              discrete
        DiT-L/2   24     6              14             discrete
        DiT-XL/2  28     8              16             discrete
        <BLANKLINE>
        recipe   models  distance  weight  epoch_400  epoch_800  decay
        default  SiT     cosine    0.5     0.5        0.5        0.9999
        default  DiT     cosine    0.5     0.5        0.5        0.9999
        >>> code
        0
    """
    settings = make_parser().parse_args(arguments)
    report: Report = {}
    try:
        # what packages and models print must not end up in the report
        with contextlib.redirect_stdout(sys.stderr):
            settings.run(settings, report)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if settings.json:
            report["error"] = str(error)
        _print_report(report, settings.json)
        return _print_error(error)
    _print_report(report, settings.json)
    return 0


def _print_report(report: Report, as_json: bool) -> None:
    if report:
        print(json.dumps(report, indent=2) if as_json else text_of(report), flush=True)


def _print_error(error: Exception) -> int:
    """Print the error, with its place where it is none of ours; returns the exit code."""
    if not isinstance(error, (WrongUsage, ValueError, TypeError)):
        traceback.print_exception(error)
    print(f"selfalign: {error}", file=sys.stderr)
    return 2 if isinstance(error, WrongUsage) else 1


def make_parser() -> ArgumentParser:
    """The parser of the command line."""
    parser = ArgumentParser(
        "selfalign",
        description=options.DESCRIPTION,
        epilog=options.EXAMPLES + options.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"selfalign {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (run, text, notes) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=notes + options.EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        help_text = "one JSON object on stdout instead of text"
        command.add_argument("--json", action="store_true", help=help_text)
        command.set_defaults(run=run)
    options.add_presets_options(commands.choices["presets"])
    options.add_check_options(commands.choices["check"])
    return parser
