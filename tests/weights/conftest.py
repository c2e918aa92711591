"""Models of which only the weights are there."""

import pytest

from nnunet_lomix.weights.history import write_history


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Writes the histories of the folds of a model; gives its folder."""
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)

    def write(*histories, name="T__P__2d"):
        folder = tmp_path / "Dataset001_A" / name
        for i, history in enumerate(histories):
            (folder / f"fold_{i}").mkdir(parents=True)
            write_history(history, folder / f"fold_{i}")
        return folder

    return write
