"""The small setting, written once."""

import pytest

from .world import write_world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder of the setting, not to be changed."""
    folder = tmp_path_factory.mktemp("world") / "world"
    write_world(folder)
    return folder
