"""The small setting, and what was counted: with ``FUZZ_EXAMPLES=100`` a hundred inputs in each test."""

import pytest

from .commands import COUNTS, EXAMPLES
from .world import write_world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The small setting, not to be changed."""
    folder = tmp_path_factory.mktemp("world") / "world"
    write_world(folder)
    return folder


def pytest_terminal_summary(terminalreporter):
    for (command, outcome), count in sorted(COUNTS.items()) if EXAMPLES else ():
        terminalreporter.write_line(f"{command} {outcome}: {count}")
