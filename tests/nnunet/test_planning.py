"""What nnU-Net's planning and preprocessing lack for a training."""

import json
import shutil
from pathlib import Path

import pytest

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.planning import find_first_stage, list_cases, list_missing, require_folds

DATASET = "Dataset701_classes"
PREPROCESS = ("nnUNetv2_preprocess", "-d", "701", "-plans_name")


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch) -> Path:
    """A dataset that nnU-Net has planned and preprocessed, to be changed."""
    shared = prepared("classes")
    for name in ("raw", "preprocessed"):
        shutil.copytree(getattr(shared, name), tmp_path / name)
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path / "preprocessed" / DATASET


def missing(*configurations: str, plans: str = "nnUNetPlans", dataset: str = DATASET) -> list[tuple[str, ...]]:
    return list_missing(dataset, [(plans, configuration) for configuration in configurations])


def change_plans(folder: Path, **configurations: dict) -> None:
    file = folder / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"] |= configurations
    file.write_text(json.dumps(plans))


def test_preprocessing_that_is_missing_or_was_not_finished(folder):
    assert missing("2d", "3d_fullres") == []
    next((folder / "nnUNetPlans_2d").glob("*.pkl")).unlink()
    expected = (*PREPROCESS, "nnUNetPlans", "-c", "2d", "--no_pbar")
    assert missing("2d", "3d_fullres") == [expected]
    shutil.rmtree(folder / "nnUNetPlans_2d")
    assert missing("2d") == [expected]
    (folder.parents[1] / "raw" / DATASET / "dataset.json").unlink()
    with pytest.raises(LoMixError, match="dataset.json isn't there: every raw dataset of nnU-Net has one"):
        missing("2d")
    shutil.rmtree(folder.parents[1] / "raw")
    with pytest.raises(LoMixError, match="is not preprocessed, and not in nnUNet_raw"):
        missing("2d")


def test_a_wrong_number_in_dataset_json_is_not_believed(folder):
    file = folder / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"numTraining": 99}))
    assert missing("2d") == []


def test_plans_that_are_missing(folder):
    planning = ("nnUNetv2_plan_experiment", "-d", "701", "-pl", "nnUNetPlannerResEncM")
    data = (*PREPROCESS, "nnUNetResEncUNetMPlans", "-c", "2d", "--no_pbar")
    assert missing("2d", plans="nnUNetResEncUNetMPlans") == [planning, data]
    (folder / "dataset_fingerprint.json").unlink()
    fingerprint = ("nnUNetv2_extract_fingerprint", "-d", "701", "--no_pbar")
    assert missing("2d", plans="nnUNetResEncUNetMPlans") == [fingerprint, planning, data]
    with pytest.raises(LoMixError, match="has no plans mine, and nnU-Net no planner"):
        missing("2d", plans="mine")
    with pytest.raises(LoMixError, match="has no configuration 2D in its nnUNetPlans: there are 2d, 3d_fullres"):
        missing("2D")
    with pytest.raises(LoMixError, match="Dataset9_x' is not the name of a dataset"):
        missing("2d", dataset="Dataset9_x")


def test_forged_plans_get_a_sentence(folder):
    change_plans(folder, **{"2d": {"inherits_from": "2d"}})
    with pytest.raises(LoMixError, match=r"nnUNetPlans.json is not nnU-Net's"):
        missing("2d")


def test_folds_and_their_cases(folder):
    (folder / "splits_final.json").unlink(missing_ok=True)
    with pytest.raises(LoMixError, match="has the folds 0 to 4, not 5"):
        require_folds(DATASET, [5, 0])
    every = {f"case_{i}" for i in range(5)}
    assert list_cases(DATASET, "nnUNetPlans", "2d", "0") == every
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["case_0"], "val": ["case_1"]}] * 7))
    require_folds(DATASET, [6])
    assert list_cases(DATASET, "nnUNetPlans", "2d", "6") == {"case_0", "case_1"}
    assert list_cases(DATASET, "nnUNetPlans", "2d", "all") == every


def test_the_stages_of_a_cascade(folder):
    change_plans(
        folder,
        **{
            "3d_lowres": {"inherits_from": "3d_fullres", "next_stage": "3d_cascade_fullres"},
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        },
    )
    assert find_first_stage(DATASET, "nnUNetPlans", "3d_cascade_fullres") == "3d_lowres"
    assert find_first_stage(DATASET, "nnUNetPlans", "3d_lowres") is None
    assert find_first_stage(DATASET, "unplanned", "3d_cascade_fullres") == "3d_lowres"
    assert missing("3d_cascade_fullres") == []
    shutil.rmtree(folder / "nnUNetPlans_3d_fullres")
    assert missing("3d_cascade_fullres") == [(*PREPROCESS, "nnUNetPlans", "-c", "3d_fullres", "--no_pbar")]
