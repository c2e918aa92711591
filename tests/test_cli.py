"""What the library raises, as the command line shows it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from nnunet_lomix import splits
from nnunet_lomix.cli import STOPPING, Command, main
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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "-d", "4", "-device", "cpu"], "There is no option -device; did you mean --device?"),
        (["compare", "-trainers", "A"], "There is no option -trainers; did you mean --trainers?"),
        (["status", "-pretrained_weights", "plan.yaml"], "There is no option -pretrained_weights."),
    ],
)
def test_options_as_nnunet_spells_them_are_no_bundles_of_letters(arguments, sentence):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and sentence in result.output


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


def test_summaries_are_wrapped_and_not_cut():
    output = CliRunner().invoke(main, ["--help"], env={"COLUMNS": "60"}).output
    assert output.count("...") == 1  # of "COMMAND [ARGS]..."
    said = " ".join(output.split())
    for command in main.commands.values():
        assert command.help.split(".\n")[0].removesuffix(".") in said


INTERRUPTED = """
import os, signal, sys

class Interrupt:
    def find_spec(name, path=None, target=None):
        if name == "pandas":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                [None for _ in range(1000)]
            except KeyboardInterrupt:
                raise ImportError("numpy's core could not be loaded") from None

sys.meta_path.insert(0, Interrupt)
"""


def test_an_interrupt_in_an_import_ends_the_process_at_once(tmp_path):
    """Extensions make any exception of it, and so there was a traceback."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    command = [Path(sys.executable).parent / "nnunet_lomix", "weights", "."]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, b"", b"")


def test_signals_are_interrupts_while_a_command_runs_and_as_before_afterwards(monkeypatch):
    before = [signal.getsignal(number) for number in STOPPING]
    seen = []
    monkeypatch.setattr(splits, "add_scarce_folds", lambda *_: seen.extend(map(signal.getsignal, STOPPING)))
    CliRunner().invoke(main, ["splits", "-d", "1"])
    assert seen == 3 * [signal.default_int_handler]
    assert [signal.getsignal(number) for number in STOPPING] == before


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in main.commands)])
def test_the_help_of_every_command_is_printed_in_any_encoding(arguments):
    command = [Path(sys.executable).parent / "nnunet_lomix", *arguments]
    result = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "latin-1"}, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"") and result.stdout.startswith(b"Usage: nnunet_lomix ")
