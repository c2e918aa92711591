"""What is prepared and refused before the trainings of an experiment; which commands, is told in tests/nnunet."""

import json
import os
import shutil

import pytest

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.experiments.preparation import Preparation, find_obstacle, find_todo
from nnunet_lomix.experiments.training import State, Training
from nnunet_lomix.locks import NAME as LOCK

from ..fuzz.world import DATASET
from .conftest import make_cascade


def prepare(setting, **changes) -> Preparation:
    (preparation,) = find_todo(dict.fromkeys(setting.trainings(**changes), State.MISSING)).preparations
    return preparation


@pytest.mark.end_to_end
def test_other_plans_leave_the_data_alone_that_trainings_may_be_reading(prepared, tmp_path, monkeypatch):
    """nnU-Net's own command for both would write the data anew, which these plans have in common."""
    for name in ("raw", "preprocessed"):
        shutil.copytree(getattr(prepared("classes"), name), tmp_path / name)
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    folder = tmp_path / "preprocessed/Dataset701_classes"
    before = {file.name: file.stat().st_mtime_ns for file in (folder / "nnUNetPlans_2d").iterdir()}
    training = Training(folder.name, "2d", "nnUNetResEncUNetMPlans", "nnUNetTrainer", "0", tmp_path, tmp_path)
    (preparation,) = find_todo({training: State.MISSING}).preparations
    preparation.run()
    assert preparation.list_commands() == [] and (folder / "nnUNetResEncUNetMPlans.json").is_file()
    assert {file.name: file.stat().st_mtime_ns for file in (folder / "nnUNetPlans_2d").iterdir()} == before


def test_nnunets_own_folds_are_written_before_trainings_start_side_by_side(setting):
    file = setting.dataset / "splits_final.json"
    before = file.read_text()
    prepare(setting).run()
    assert file.read_text() == before and not (setting.dataset / LOCK).exists()  # there was nothing to do
    file.unlink()
    prepare(setting, folds=("all",)).run()
    assert not file.exists()
    prepare(setting).run()
    splits = json.loads(file.read_text())
    assert len(splits) == 5 and sorted(case for fold in splits for case in fold["val"]) == list("abcdef")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_read_only_data_serves_if_nothing_is_missing_and_gets_a_remedy_if_something_is(setting, monkeypatch):
    preparation = prepare(setting)
    setting.folder.chmod(0o755)
    monkeypatch.chdir(setting.folder)  # and relative paths, as tests' folders are closed to others
    for name in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{name}", name)
    os.seteuid(65534)
    try:
        preparation.run()
        os.seteuid(0)
        (setting.dataset / "splits_final.json").unlink()
        os.seteuid(65534)
        with pytest.raises(LoMixError, match=f"^preprocessed/{DATASET} can't be written .Permission denied., but"):
            preparation.run()
    finally:
        os.seteuid(0)


def test_a_second_stage_waits_for_the_predictions_of_the_cases_of_its_fold(setting):
    make_cascade(setting.dataset)
    (setting.dataset / "nnUNetPlans_2d/left_out.pkl").touch()
    cascade = {"configurations": ("3d_lowres", "3d_cascade_fullres"), "trainers": ("nnUNetTrainer",)}
    first, second, on_all = (
        t for t in setting.trainings(**cascade, folds=("0", "all")) if t.fold + t.configuration != "all3d_lowres"
    )
    assert find_obstacle(first) == ""
    predicted = first.model.path / "predicted_next_stage" / "3d_cascade_fullres"
    predicted.mkdir(parents=True)
    for number, case in enumerate("abcdef"):
        waits = "3d_lowres of its trainer, which must be trained and validated on all folds, and has not predicted "
        names = {3: "d, e, f", 5: "f"}.get(number, f"{case}, ")
        assert find_obstacle(second).startswith(waits + names)
        (predicted / f"{case}.b2nd").touch()
    assert find_obstacle(second) == "" and find_obstacle(on_all).endswith("predicted left_out")
    (setting.dataset / "nnUNetPlans.json").unlink()
    assert find_obstacle(on_all).startswith("3d_lowres of its trainer")


def test_a_trainer_that_refuses_the_plans_is_told_after_planning_too(setting):
    """The folds are missing, so there is something to do; the network of the setting has a single output."""
    (setting.dataset / "splits_final.json").unlink()
    with pytest.raises(LoMixError, match="nnUNetTrainerLoMix mixes several decoder outputs"):
        prepare(setting, trainers=("nnUNetTrainerLoMix",)).run()
