"""Work in several processes, for which files have whole paths, as joblib keeps its processes."""

import operator

import numpy as np
import pytest

from nnunet_lomix.compare import compare, read_folders
from nnunet_lomix.compare.processes import in_processes
from nnunet_lomix.errors import LoMixError
from tests.nnunet.files import save


def test_files_are_those_of_the_folder_in_which_one_is_now(tmp_path, monkeypatch):
    for place, value in (("first", 1), ("second", 2)):
        for folder, own_value in (("truth", value), ("x", value), ("y", 0)):
            for case in "ab":
                save(np.full((3, 3, 3), own_value, np.uint8), tmp_path / place / folder / f"{case}.nii.gz")
        monkeypatch.chdir(tmp_path / place)
        source = read_folders("truth", ["x", "y"], jobs=2)
        assert list(source.labels) == [str(value)]
        scores = compare(source, jobs=2, metrics=["Dice"]).scores
        assert scores.groupby("trainer")["value"].mean().to_dict() == {"x": 1, "y": 0}
    save(np.zeros((3, 3, 2), np.uint8), tmp_path / "second" / "y" / "b.nii.gz")
    with pytest.raises(LoMixError, match=r"y/b\.nii\.gz has the shape 3 × 3 × 2"):
        compare(source, jobs=2, metrics=["Dice"])


def test_a_temporary_folder_that_joblib_cannot_use_is_told(tmp_path, monkeypatch):
    (tmp_path / "tüte").mkdir()
    monkeypatch.setenv("JOBLIB_TEMP_FOLDER", str(tmp_path / "tüte"))
    with pytest.raises(LoMixError, match="isn't ASCII: set JOBLIB_TEMP_FOLDER to another one, or give --jobs 1"):
        list(in_processes(operator.add, [(1, 2), (3, 4)], 2))
    assert list(in_processes(operator.add, [(1, 2)], 1)) == [3]
