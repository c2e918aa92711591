"""What must be planned and preprocessed before the trainings of an experiment."""

import json
import shutil
from pathlib import Path

import pytest

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.experiments.preparation import Preparation, find_first_stage, find_preparations
from nnunet_lomix.experiments.training import Training

NAMES = ("raw", "preprocessed", "results")
DATASET = "Dataset701_classes"


@pytest.fixture
def folders(prepared, tmp_path, monkeypatch):
    """A dataset that nnU-Net has planned and preprocessed, to be changed."""
    shared = prepared("classes")
    for name in NAMES:
        if name != "results":
            shutil.copytree(getattr(shared, name), tmp_path / name)
    for name in NAMES:
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path


def trainings(folders: Path, *configurations: str, fold: str = "0", plans: str = "nnUNetPlans", dataset=DATASET):
    return [Training(dataset, c, plans, "nnUNetTrainer", fold, folders / "results") for c in configurations]


def commands(*wanted: Training) -> list[tuple[str, ...]]:
    return [command for preparation in find_preparations(wanted) for command in preparation.list_commands()]


def test_nothing_is_missing(folders):
    assert commands(*trainings(folders, "2d", "3d_fullres")) == []


def test_preprocessing_that_is_missing_or_was_not_finished(folders):
    data = folders / "preprocessed" / DATASET / "nnUNetPlans_2d"
    next(data.glob("*.pkl")).unlink()
    expected = ("nnUNetv2_preprocess", "-d", "701", "-plans_name", "nnUNetPlans", "-c", "2d", "--no_pbar")
    assert commands(*trainings(folders, "2d", "3d_fullres")) == [expected]
    shutil.rmtree(data)
    assert commands(*trainings(folders, "2d")) == [expected]
    shutil.rmtree(folders / "raw")
    with pytest.raises(LoMixError, match="is not preprocessed, and not in nnUNet_raw"):
        find_preparations(trainings(folders, "2d"))


def test_a_wrong_number_in_dataset_json_is_not_believed(folders):
    file = folders / "preprocessed" / DATASET / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"numTraining": 99}))
    assert commands(*trainings(folders, "2d")) == []


def test_plans_that_are_missing(folders):
    planning = ("nnUNetv2_plan_experiment", "-d", "701", "-pl", "nnUNetPlannerResEncM")
    data = ("nnUNetv2_preprocess", "-d", "701", "-plans_name", "nnUNetResEncUNetMPlans", "-c", "2d", "--no_pbar")
    assert commands(*trainings(folders, "2d", plans="nnUNetResEncUNetMPlans")) == [planning, data]
    (folders / "preprocessed" / DATASET / "dataset_fingerprint.json").unlink()
    fingerprint = ("nnUNetv2_extract_fingerprint", "-d", "701", "--no_pbar")
    assert commands(*trainings(folders, "2d", plans="nnUNetResEncUNetMPlans")) == [fingerprint, planning, data]
    with pytest.raises(LoMixError, match="has no plans mine, and nnU-Net no planner"):
        find_preparations(trainings(folders, "2d", plans="mine"))
    with pytest.raises(LoMixError, match="has no configuration 2D in its nnUNetPlans: there are 2d, 3d_fullres"):
        find_preparations(trainings(folders, "2D"))
    with pytest.raises(LoMixError, match="Dataset9_x' is not the name of a dataset"):
        find_preparations(trainings(folders, "2d", dataset="Dataset9_x"))


@pytest.mark.end_to_end
def test_other_plans_leave_the_data_alone_that_trainings_may_be_reading(folders):
    """nnU-Net's own command for both would write the data anew, which these plans have in common."""
    data = folders / "preprocessed" / DATASET / "nnUNetPlans_2d"
    before = {file.name: file.stat().st_mtime_ns for file in data.iterdir()}
    (preparation,) = find_preparations(trainings(folders, "2d", plans="nnUNetResEncUNetMPlans"))
    preparation.run(folders / "logs" / "log")
    assert preparation.list_commands() == []
    assert (folders / "preprocessed" / DATASET / "nnUNetResEncUNetMPlans.json").is_file()
    assert {file.name: file.stat().st_mtime_ns for file in data.iterdir()} == before


def test_folds_that_are_not_there(folders):
    with pytest.raises(LoMixError, match="has the folds 0 to 4, not 5"):
        find_preparations(trainings(folders, "2d", fold="5"))
    assert not find_preparations(trainings(folders, "2d", fold="all"))[0].folded
    folder = folders / "preprocessed" / DATASET
    splits = [{"train": ["case_0"], "val": ["case_1"]}] * 7
    (folder / "splits_final.json").write_text(json.dumps(splits))
    (preparation,) = find_preparations(trainings(folders, "2d", fold="6"))
    preparation.run(folders / "log")
    assert json.loads((folder / "splits_final.json").read_text()) == splits


def test_nnunets_own_folds_are_written_before_trainings_start_side_by_side(folders):
    file = folders / "preprocessed" / DATASET / "splits_final.json"
    file.unlink(missing_ok=True)
    Preparation(DATASET, (("nnUNetPlans", "2d"),), folded=False).run(folders / "log")
    assert not file.exists()
    Preparation(DATASET, (("nnUNetPlans", "2d"),), folded=True).run(folders / "log")
    splits = json.loads(file.read_text())
    assert len(splits) == 5 and sorted(case for fold in splits for case in fold["val"]) == [
        f"case_{i}" for i in range(5)
    ]


def test_forged_plans_get_a_sentence(folders):
    file = folders / "preprocessed" / DATASET / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["2d"] = {"inherits_from": "2d"}
    file.write_text(json.dumps(plans))
    with pytest.raises(LoMixError, match=r"nnUNetPlans.json is not nnU-Net's"):
        find_preparations(trainings(folders, "2d"))


def test_the_second_stage_of_a_cascade_waits_for_the_first(folders):
    folder = folders / "preprocessed" / DATASET
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["configurations"]["3d_lowres"] = {"inherits_from": "3d_fullres", "next_stage": "3d_cascade_fullres"}
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    first, second = trainings(folders, "3d_lowres", "3d_cascade_fullres")
    assert find_first_stage(first) is None
    predicted = first.model.path / "predicted_next_stage" / "3d_cascade_fullres"
    predicted.mkdir(parents=True)
    for case in range(5):
        assert find_first_stage(second) == "3d_lowres"
        (predicted / f"case_{case}.b2nd").touch()
    assert find_first_stage(second) is None
