"""What the library raises, as the command line shows it."""

import pytest
from click.testing import CliRunner

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
