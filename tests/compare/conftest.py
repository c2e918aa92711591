"""Trees of files to compare."""

from pathlib import Path

import pytest

from tests.compare.trees import Trees, write


@pytest.fixture
def trees(tmp_path, monkeypatch) -> Trees:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    return Trees(tmp_path)


@pytest.fixture
def pair(trees) -> Trees:
    """Trainers A and B."""
    trees.add("A", 1), trees.add("B", 2)
    return trees


@pytest.fixture
def folders(tmp_path) -> Path:
    for i, name in enumerate(("data/truth", "old", "new")):
        for case in "ab":
            write(tmp_path / name / f"{case}.nii.gz", 10 * i + ord(case))
    return tmp_path
