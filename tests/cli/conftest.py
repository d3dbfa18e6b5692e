"""Fixtures of the command's tests: runs of the command line, as text and as JSON."""

import json
import sys

import pytest

from selfalign import cli


@pytest.fixture(autouse=True)
def _process_as_it_was(monkeypatch):
    """The command expects a process of its own: it puts folders on the path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.fixture
def shown(capsys):
    """Runs the command line: (exit code, stdout, stderr)."""

    def run(*arguments):
        code = cli.main(list(arguments))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def report(shown):
    """Runs the command line with --json: the report of a run that ends well."""

    def run(*arguments):
        code, out, errors = shown(*arguments, "--json")
        assert code == 0, errors
        return json.loads(out)

    return run


@pytest.fixture
def lines():
    """The lines of a text, with single spaces."""
    return lambda text: [" ".join(line.split()) for line in text.splitlines()]
