"""Work in several processes, for which files have whole paths, as joblib keeps its processes."""

import operator

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_lomix.compare import compare, read_folders
from nnunet_lomix.compare.processes import in_processes
from nnunet_lomix.errors import LoMixError


def test_files_are_those_of_the_folder_in_which_one_is_now(tmp_path, monkeypatch):
    for place, value in (("first", 1), ("second", 2)):
        for folder in ("truth", "x", "y"):
            (tmp_path / place / folder).mkdir(parents=True)
            for case in "ab":
                array = np.full((3, 3, 3), value if folder != "y" else 0, np.uint8)
                sitk.WriteImage(sitk.GetImageFromArray(array), tmp_path / place / folder / f"{case}.nii.gz")
        monkeypatch.chdir(tmp_path / place)
        source = read_folders("truth", ["x", "y"], jobs=2)
        assert list(source.labels) == [str(value)]
        scores = compare(source, jobs=2, metrics=["Dice"]).scores
        assert scores.groupby("trainer")["value"].mean().to_dict() == {"x": 1, "y": 0}


def test_a_temporary_folder_that_joblib_cannot_use_is_told(tmp_path, monkeypatch):
    (tmp_path / "tüte").mkdir()
    monkeypatch.setenv("JOBLIB_TEMP_FOLDER", str(tmp_path / "tüte"))
    with pytest.raises(LoMixError, match="isn't ASCII: set JOBLIB_TEMP_FOLDER to another one, or give --jobs 1"):
        list(in_processes(operator.add, [(1, 2), (3, 4)], 2))
    assert list(in_processes(operator.add, [(1, 2)], 1)) == [3]
