"""The study's scripts and extensions, for the tests of this folder alone."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from nnunet_lomix.loss import RULES

STUDY = Path(__file__).parents[3] / "benchmarks" / "study"


@pytest.fixture(scope="module", autouse=True)
def extensions() -> Iterator[ModuleType]:
    """The study's extensions; Python finds its scripts, too, and the rules of the extensions are registered.

    At the end all is as before: tests of the package must not see the study's rules among its own.
    """
    rules = set(RULES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STUDY)
        patch.syspath_prepend(STUDY / "study_trainers")
        yield import_module("extensions")
    for name in set(RULES) - rules:
        del RULES[name]
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(STUDY):
            del sys.modules[name]
