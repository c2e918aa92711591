"""The study's scripts, for the tests of this folder alone."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[3] / "benchmarks" / "study"


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """Python finds the study's scripts; at the end it has forgotten them again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STUDY)
        patch.syspath_prepend(STUDY / "study_trainers")
        yield
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(STUDY):
            del sys.modules[name]
