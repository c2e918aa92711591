"""What the library raises, as the command line shows it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from nnunet_lomix import splits
from nnunet_lomix.cli import Command, main
from nnunet_lomix.errors import LoMixError, UsageError


def run(monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(splits, "add_scarce_folds", fail)
    return CliRunner().invoke(main, ["splits", "-d", "1"])


def test_an_error_is_one_sentence(monkeypatch):
    result = run(monkeypatch, LoMixError("The thing: mend it."))
    assert (result.exit_code, result.output) == (1, "Error: The thing: mend it.\n")


def test_a_wrong_use_shows_how_the_command_is_used(monkeypatch):
    result = run(monkeypatch, UsageError("These don't fit."))
    assert result.exit_code == 2 and result.output.startswith("Usage: main splits [OPTIONS]\n")
    assert result.output.endswith("\nError: These don't fit.\n")


def test_other_exceptions_are_defects_and_stay_as_they_are(monkeypatch):
    assert isinstance(run(monkeypatch, KeyError("a")).exception, KeyError)


@pytest.mark.parametrize("name", main.commands)
def test_every_command_shows_errors_so(name):
    assert isinstance(main.commands[name], Command)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_what_an_encoding_lacks_is_replaced(monkeypatch, encoding):
    """A minus sign, which neither of them has, in what a command prints and in its error."""

    def fail(*args):
        Console().print("1 \N{MINUS SIGN} 2")
        raise LoMixError("3 \N{MINUS SIGN} 4: mend it.")

    monkeypatch.setattr(splits, "add_scarce_folds", fail)
    result = CliRunner(charset=encoding).invoke(main, ["splits", "-d", "1"])
    assert (result.exit_code, result.stdout) == (1, "1 ? 2\n")
    assert result.stderr == "Error: 3 ? 4: mend it.\n"


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in main.commands)])
def test_the_help_of_every_command_is_printed_in_any_encoding(arguments):
    command = [Path(sys.executable).parent / "nnunet_lomix", *arguments]
    result = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "latin-1"}, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"") and result.stdout.startswith(b"Usage: nnunet_lomix ")
