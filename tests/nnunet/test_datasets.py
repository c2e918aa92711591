"""Datasets, against what nnU-Net itself finds and writes."""

import json

import pytest
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet import datasets

NAME = "Dataset123_Few"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Sets nnU-Net's three variables to folders, each of which has the dataset."""
    for part in ("raw", "preprocessed", "results"):
        (tmp_path / part / NAME).mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{part}", str(tmp_path / part))
    return tmp_path


def test_roots_are_those_of_the_environment_now(folders, monkeypatch):
    for part in ("raw", "preprocessed", "results"):
        variable = f"nnUNet_{part}"
        assert datasets.find_root(variable) == datasets.require_root(variable) == folders / part
        monkeypatch.delenv(variable)
        assert datasets.find_root(variable) is None
        with pytest.raises(LoMixError, match=f"{variable} is not set: export {variable}=/your/folder first"):
            datasets.require_root(variable)
        monkeypatch.setenv(variable, f"~/{part}")
        with pytest.raises(LoMixError, match=f"{variable} is '~/{part}', but nnU-Net needs the whole path"):
            datasets.find_root(variable)


def test_a_dataset_has_a_number_and_a_name(folders):
    with pytest.raises(LoMixError, match="Could not find a dataset Dataset999_Nowhere: check -d"):
        datasets.name_dataset("Dataset999_Nowhere")
    (folders / "elsewhere" / "Dataset999_Nowhere").mkdir(parents=True)
    assert datasets.name_dataset("Dataset999_Nowhere", results=[folders / "elsewhere"]) == "Dataset999_Nowhere"
    for part in ("preprocessed", "raw", "results"):  # enough in the last one that is left
        assert datasets.name_dataset("123") == datasets.name_dataset("0123") == NAME
        (folders / part / NAME).rmdir()
    with pytest.raises(LoMixError, match="^Could not find a dataset with the ID 123: check -d, nnUNet_preprocessed, "):
        datasets.name_dataset("123")


def test_what_names_no_dataset_is_refused(folders):
    (folders / "raw" / "Dataset123_Other").mkdir()
    with pytest.raises(LoMixError, match="^More than one dataset name found for dataset id 123: check -d, nnUNet_pre"):
        datasets.name_dataset("123")
    with pytest.raises(LoMixError, match="^Could not find a dataset with the ID 9: check the weather.$"):
        datasets.name_dataset("9", "the weather")
    with pytest.raises(LoMixError, match="^'Liver' is neither the number nor the name of a dataset.$"):
        datasets.name_dataset("Liver")


@pytest.mark.parametrize("typo", ["Few", "few", "Dataset123_Fw", "Dataset12_Few"])
def test_typos_get_a_suggestion(folders, typo):
    with pytest.raises(LoMixError, match=rf"; did you mean {NAME}\?$"):
        datasets.require_preprocessed(typo)


def test_preprocessed_datasets(folders):
    folder = folders / "preprocessed" / NAME
    assert datasets.require_preprocessed("123") == datasets.require_preprocessed(NAME) == folder
    folder.rmdir()
    with pytest.raises(LoMixError, match=f"{NAME} is not in nnUNet_preprocessed .* run nnUNetv2_plan_and_preprocess"):
        datasets.require_preprocessed("123")


def test_references_are_nnunets_copy_or_the_raw_labels(folders, monkeypatch):
    with pytest.raises(LoMixError, match=f"neither {NAME}/gt_segmentations in nnUNet_preprocessed nor {NAME}/labelsTr"):
        datasets.require_references(NAME)
    raw, copy = folders / "raw" / NAME / "labelsTr", folders / "preprocessed" / NAME / "gt_segmentations"
    raw.mkdir()
    assert datasets.require_references(NAME) == raw
    copy.mkdir()
    assert datasets.require_references(NAME) == copy
    monkeypatch.delenv("nnUNet_preprocessed")
    assert datasets.require_references(NAME) == raw


def test_images_are_those_that_nnunet_trains_on(folders, monkeypatch):
    assert datasets.find_part(NAME, "imagesTr") is None
    raw = folders / "raw" / NAME
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir()
    files = [raw / "imagesTr" / datasets.name_image("a_1", channel, ".nii.gz") for channel in (0, 1)]
    for file in files:
        file.touch()
    known = get_filenames_of_train_images_and_targets(str(raw), {"file_ending": ".nii.gz"})
    assert known["a_1"]["images"] == [str(file) for file in files]
    assert datasets.find_part(NAME, "imagesTr") == files[0].parent
    monkeypatch.delenv("nnUNet_raw")
    assert datasets.find_part(NAME, "imagesTr") is None


def test_names_that_begin_with_a_dot_are_no_cases(tmp_path):
    """macOS leaves a file ``._name`` beside each one that it copies to a foreign disk."""
    for name in ("b.nii.gz", "._b.nii.gz", "a.nii.gz", ".hidden.nii.gz", "c.png"):
        (tmp_path / name).touch()
    files = {case: tmp_path / f"{case}.nii.gz" for case in "ab"}
    assert datasets.list_cases(tmp_path, ".nii.gz") == files and list(files) == ["a", "b"]
    assert datasets.list_cases(tmp_path / "nowhere", ".nii.gz") == {}


def test_names_that_begin_with_a_dot_are_in_no_split(tmp_path):
    cases = [*"abcdef"]
    for start in ("nnUNetPlans_2d/", "nnUNetPlans_2d/._", "nnUNetPlans_empty/._"):
        for name in (f"{case}{ending}" for case in cases for ending in (".pkl", ".b2nd", "_seg.b2nd")):
            file = tmp_path / f"{start}{name}"
            file.parent.mkdir(exist_ok=True)
            file.touch()
    splits = datasets.default_splits(tmp_path)
    assert sorted(case for split in splits for case in split["val"]) == cases


def test_splits_are_written_whole_and_read_again(tmp_path):
    splits = [datasets.Split(train=["b", "é"], val=["a"]), datasets.Split(train=["a"], val=["b", "é"])]
    datasets.write_splits(tmp_path, splits)
    assert datasets.read_splits(tmp_path) == json.loads((tmp_path / "splits_final.json").read_text()) == splits
    with pytest.raises(TypeError):
        datasets.write_splits(tmp_path, [{"train": object()}])
    assert datasets.read_splits(tmp_path) == splits
    assert [file.name for file in tmp_path.iterdir()] == ["splits_final.json"]


def test_other_files_are_no_splits(tmp_path):
    with pytest.raises(LoMixError, match=r"splits_final.json can't be read: No such file"):
        datasets.read_splits(tmp_path)
    folds = ("[3]", '[{"train": []}]', '[{"train": "abc", "val": []}]', '[{"train": [3], "val": []}]')
    for content in ("", "{}[", "[" * 100_000, '{"train": []}', *folds):
        (tmp_path / "splits_final.json").write_text(content)
        with pytest.raises(LoMixError, match="is not a list of folds, each with train and val: mend or remove it"):
            datasets.read_splits(tmp_path)
