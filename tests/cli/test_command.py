"""The command line itself: usage, help, exit codes, and what its import costs."""

import subprocess
import sys

import pytest

import selfalign
from selfalign import cli
from selfalign.cli.output import text_of

pytestmark = pytest.mark.only("torch")


def test_an_interrupt_ends_quietly(shown):
    assert shown("check", "cli_models:interrupts", "--json") == (130, "", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("presets", "--recipe", "best"), "invalid choice: 'best'"),
        (
            ("check", "m:f", "--student", "early"),
            "must be a block's number from 1, or a fraction of the depth. Received: 'early'.",
        ),
        (("check", "m:f", "--input", "4,0"), "It must be sizes such as 4,32,32. Received: '4,0'."),
        (("check", "m:f", "--repeat", "0"), "It must be a whole number from 1. Received: '0'."),
        (("check", "m:f", "--time-scale", "0"), "It must be a number above 0. Received: '0'."),
    ],
)
def test_arguments_that_cannot_be_read_end_in_2(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        cli.main(list(arguments))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [(), ("presets",), ("info",), ("check",)])
def test_help_has_examples_and_exit_codes(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command, "--help"])
    text = capsys.readouterr().out
    assert f"examples:\n  selfalign {command[0] if command else 'presets'}" in text
    assert "exit codes: 0 fine, 1 a problem was found, 2 wrong usage, 130 interrupted." in text


def test_as_a_module():
    command = [sys.executable, "-m", "selfalign", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"selfalign {selfalign.__version__}\n"


def test_the_command_costs_an_import_of_selfalign_nothing():
    code = (
        "import sys, selfalign; print('selfalign.cli' in sys.modules, 'argparse' in sys.modules); "
        "import selfalign.cli; "
        "print(sorted({'torch', 'jax', 'keras', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["False False", "[]"], done.stderr


# The report as text


def test_a_report_as_text():
    report = {
        "depth": 12,
        "trained_parameters": 1234567,
        "term": 0.123456,
        "devices": ["cpu", "cuda:0"],
        "nothing": [],
        "blocks": [{"list": "a", "blocks": 4}, {"list": "longer", "blocks": 12345}],
    }
    assert text_of(report) == (
        "depth               12\n"
        "trained parameters  1,234,567\n"
        "term                0.1235\n"
        "devices             cpu, cuda:0\n"
        "nothing             none\n"
        "\n"
        "list    blocks\n"
        "a       4\n"
        "longer  12,345"
    )


def test_a_report_of_tables_alone_and_of_nothing():
    assert text_of({"rows": [{"a": 1}]}) == "a\n1"
    assert text_of({}) == ""
