"""Finding, pairing and refusing files, in trees like those that nnU-Net leaves, and in plain folders."""

import json
import os
import re
import shutil
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_lomix.compare import compare, read_folders, read_results
from nnunet_lomix.errors import LoMixError, UsageError
from tests.compare.trees import CLASSES, DATASET, MEAN_CLASS, REGIONS, write


def read(*trainers: str, **options):
    return read_results("9", "2d", trainers or ("A", "B"), **options)


def test_pairs_cases_of_all_folds(pair):
    write(pair.folder / "raw" / DATASET / "imagesTr" / "b_0000.nii.gz", 0)
    source = read()
    assert list(source.predictions) == [("A", 0), ("B", 0)] and source.trainers == ["A", "B"]
    assert source.predictions["B", 0]["c"] == pair.model("B") / "fold_1" / "validation" / "c.nii.gz"
    references = pair.folder / "preprocessed" / DATASET / "gt_segmentations"
    assert source.references == {case: references / f"{case}.nii.gz" for case in "abc"}
    assert source.labels == {"liver": (1,), "tumour": (2,)} and source.ignore is None
    assert source.reader is SimpleITKIO and source.folds == ("0", "1") and not source.notes
    assert list(source.images) == ["b"] and source.curves.empty
    assert list(read(folds=["00"]).references) == ["a", "b"]


def test_regions_and_ignored_label(trees):
    for trainer in "AB":
        trees.add(trainer, description=REGIONS)
    source = read()
    assert source.labels == {"all": (1, 2), "tumour": (2,)} and source.ignore == 3


def test_several_results_folders_are_seeds(trees, monkeypatch):
    for results in ("first", "second"):
        for trainer in "AB":
            trees.add(trainer, results=results)
    monkeypatch.setenv("HOME", str(trees.folder))
    source = read(results=["first", "~/second"])
    assert list(source.predictions) == [("A", 0), ("A", 1), ("B", 0), ("B", 1)]
    assert "second" in str(source.predictions["B", 1]["a"])


def test_equal_names_are_seeds_and_their_numbers_may_differ(pair):
    pair.add("A1", 3)
    source = read("A", "B", "A1", names=["x", "y", "x"])
    assert list(source.predictions) == [("x", 0), ("x", 1), ("y", 0)]
    assert "A1__" in str(source.predictions["x", 1]["a"])
    result = compare(source, metrics=["Dice"])
    row = result.comparison.set_index("class").loc["mean"]
    assert len(row["by_seed"]) == 1 and len(row["reference_by_seed"]) == 2
    assert [len(folders) for folders in result.information["folders"].values()] == [2, 1]


def test_intersection_compares_common_cases_and_names_the_others(pair):
    (pair.model("B") / "fold_0" / "validation" / "a.nii.gz").unlink()
    with pytest.raises(LoMixError, match=r"B__.*lacks.* a: .*--intersection"):
        read()
    source = read(intersection=True)
    assert list(source.references) == ["b", "c"] and all(list(own) == ["b", "c"] for own in source.predictions.values())
    assert source.notes == ("2 of 3 cases are predicted by all; left out: a.",)


def swap_folds(trees):
    model = trees.model("B")
    for case, (old, new) in {"b": "01", "c": "10"}.items():
        shutil.move(model / f"fold_{old}/validation/{case}.nii.gz", model / f"fold_{new}/validation/{case}.nii.gz")


def repeat_case(trees):
    shutil.copy(*(trees.model("B") / f"fold_{fold}/validation/a.nii.gz" for fold in "01"))


def add_mean_class(trees):
    for trainer in "AB":
        trees.add(trainer, description=MEAN_CLASS)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: shutil.rmtree(t.model("B")), r"no 'B__nnUNetPlans__2d' in .*; did you mean A__nnUNetPlans__2d\?"),
        (swap_folds, r"B__.* and .*A__.* different splits: b, c"),
        (repeat_case, r"a is validated in folds 0 and 1 of .*B__"),
        (lambda t: (t.references / "c.nii.gz").unlink(), r"gt_segmentations has no reference of c"),
        (lambda t: shutil.rmtree(t.references), rf"no references.*{DATASET}/gt_segmentations"),
        (lambda t: t.add("B", spacing=(2.0, 2.0)), r"spacing of .*B__.*\[2.0, 2.0\].*A__.*\[1.0, 1.0\]"),
        (lambda t: t.add("B", patch_size=[64, 64]), r"planned patch_size of .*B__.*\[64, 64\].*A__"),
        (add_mean_class, r"No class can be called mean"),
        (lambda t: t.add("B", description=REGIONS), r"labels of .*B__.*all.*A__.*liver"),
        (lambda t: (t.model("B") / "plans.json").unlink(), r"B__.*plans.json isn't there"),
        (lambda t: (t.model("B") / "dataset.json").write_text("{"), r"B__.*dataset.json can't be read"),
        (lambda t: (t.model("B") / "dataset.json").write_text("{}"), r"dataset.json is not.*: .*labels, file_ending"),
    ],
)
def test_refuses_what_differs_by_name(pair, damage, message):
    damage(pair)
    for options in ({}, {"intersection": True}):
        with pytest.raises(LoMixError) as error:
            read(**options)
        assert re.search(message, str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["fold_1", "fold_1/validation/c.nii.gz"])
def test_folds_that_not_all_have_are_refused_or_left_out_by_name(pair, damage):
    shutil.move(pair.model("B") / damage, pair.folder / "away")
    with pytest.raises(LoMixError, match=r"B__.* no validation of fold 1: .*-f, or .*--intersection"):
        read()
    source = read(intersection=True)
    assert source.folds == ("0",) and list(source.references) == ["a", "b"]
    assert source.notes == ("Compared are the folds that all have, 0; left out: 1 (not in B__nnUNetPlans__2d).",)
    for intersection in (False, True):
        with pytest.raises(LoMixError, match=r"no validation of fold 4"):  # nobody has that one
            read(intersection=intersection, folds=["0", "4"])


def test_what_nnunet_can_validate_is_told_from_what_must_be_trained(pair):
    """nnUNetv2_train --val loads checkpoint_final.pth, which an untrained or interrupted fold hasn't.

    A validation by an earlier checkpoint is none: trained again to the end, and the validation interrupted.
    """
    fold = pair.model("B") / "fold_1"
    (fold / "checkpoint_final.pth").touch()
    stale = "the checkpoint of B__nnUNetPlans__2d/fold_1 is newer than its validation: run nnUNetv2_train with --val"
    with pytest.raises(LoMixError, match=f"no validation of fold 1: {stale}"):
        read()
    assert read(intersection=True).folds == ("0",)
    shutil.rmtree(fold / "validation")
    with pytest.raises(LoMixError, match="no validation of fold 1: run nnUNetv2_train with --val, choose"):
        read()
    (fold / "checkpoint_final.pth").unlink()
    untrained = "train with nnUNetv2_train, as B__nnUNetPlans__2d/fold_1 isn't trained to the end"
    with pytest.raises(LoMixError, match=untrained):
        read()


def test_without_a_common_fold_there_is_nothing_to_compare(pair):
    for trainer, fold in (("A", "0"), ("B", "1")):
        shutil.rmtree(pair.model(trainer) / f"fold_{fold}")
    with pytest.raises(LoMixError, match=r"No fold is validated in all of .*A__.*B__"):
        read(intersection=True)


def test_full_and_scarce_folds_are_told_apart(pair):
    """Scarce folds have the validation cases of the fold that they are drawn from."""
    for trainer in "AB":
        for fold, scarce in (("0", "2"), ("0", "3"), ("1", "10")):
            shutil.copytree(pair.model(trainer) / f"fold_{fold}", pair.model(trainer) / f"fold_{scarce}")
    with pytest.raises(LoMixError, match=r"a is validated in folds 0 and 2 .*: choose -f 0 1, or -f 2 10, or -f 3\.$"):
        read()
    assert read(folds=["2", "10"]).folds == ("2", "10")


def test_fold_all_is_taken_only_if_asked_for(pair):
    for trainer in "AB":
        shutil.copytree(pair.model(trainer) / "fold_0", pair.model(trainer) / "fold_all")
    assert read().folds == ("0", "1")
    assert "validated on the cases that it was trained with" in read(folds=["all"]).notes[0]
    for trainer in "AB":
        for fold in "01":
            shutil.rmtree(pair.model(trainer) / f"fold_{fold}")
    with pytest.raises(LoMixError, match="ask for it by -f all"):
        read()


def test_cases_that_no_trainer_has_validated_are_missed(pair):
    splits = [{"train": ["c"], "val": ["a", "b"]}, {"train": ["a", "b"], "val": ["c", "d"]}]
    (pair.references.parent / "splits_final.json").write_text(json.dumps(splits))
    with pytest.raises(LoMixError, match=r"No validation of fold 1 has d, though .* run nnUNetv2_train"):
        read()
    assert list(read(intersection=True).references) == ["a", "b", "c"]
    assert list(read(folds=["0"]).references) == ["a", "b"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"names": ["A", "A"]}, "All 2 are called A, which makes them seeds of one trainer: give each its --names"),
        ({"names": ["A"]}, "a name for each of the 2 --trainers, not 1"),
        ({"results": ["results"] * 2}, "A is given twice with the same folder"),
        ({"names": ["A"] * 2, "results": ["results"] * 2}, "A is given twice with the same folder"),
        ({"folds": ["0,1"]}, "^-f takes numbers or all, separated by spaces, not '0,1'.$"),
        ({"results": ["results", "empty"]}, rf"There is no {DATASET} in the results folder empty: .*--results\.$"),
    ],
)
def test_refuses_what_does_not_fit_together(pair, options, message):
    with pytest.raises(LoMixError, match=message) as error:
        read(**options)
    assert isinstance(error.value, UsageError) or "empty" in message


def test_a_typo_of_the_dataset_gets_a_suggestion(pair):
    with pytest.raises(LoMixError, match=rf"; did you mean {DATASET}\?$"):
        read_results("Dataset009_Toi", "2d", ["A", "B"])


def test_a_checkpoint_that_cannot_be_used_costs_only_its_curves(pair):
    """Trainers of others may save what no checkpoint of nnU-Net has; their predictions can be scored all the same."""
    starts, ends = [1000.0, 1200.0, 1300.0], [1118.25, 1261.0]  # a third epoch has begun
    checkpoint = {
        "network_weights": {"w": torch.zeros(2)},
        "trainer_name": "A",
        "init_args": {"configuration": "2d"},
        "current_epoch": 2,
        "logging": {"mean_fg_dice": [0.5, 0.6], "epoch_start_timestamps": starts, "epoch_end_timestamps": ends},
    }
    for trainer, more in (("A", {"settings": Path("anything")}), ("B", {})):
        file = pair.model(trainer) / "fold_1" / "checkpoint_final.pth"
        torch.save(checkpoint | more, file)
        os.utime(file, (1300, 1300))  # before the validation
    source = read()
    places = source.curves[["trainer", "seed", "fold", "epoch"]]
    assert [*places.itertuples(index=False, name=None)] == [("B", 0, "1", 0), ("B", 0, "1", 1)]
    assert compare(source, metrics=["Dice"]).information["epoch_seconds"] == {"B": (118.25 + 61) / 2}
    (note,) = source.notes
    assert re.match(r"There are no learning curves of A: .*checkpoint_final.pth has pathlib\.", note)


# plain folders


def read_plain(folder: Path, *names: str, **options):
    return read_folders(folder / "data" / "truth", [folder / name for name in names or ("old", "new")], **options)


@pytest.mark.parametrize("place", ["old", "data/truth", "data"])
def test_labels_of_a_dataset_json_beside(folders, place):
    (folders / place / "dataset.json").write_text(json.dumps(REGIONS))
    source = read_plain(folders)
    assert source.labels == {"all": (1, 2), "tumour": (2,)} and source.ignore == 3
    assert source.label_source == str(folders / place / "dataset.json") and source.trainers == ["old", "new"]


def test_without_dataset_json_labels_are_the_values_of_the_references(folders):
    write(folders / "new" / "a.nii.gz", 7)
    source = read_plain(folders)
    assert source.labels == {"1": (1,), "2": (2,)} and "all values of the references" in source.label_source
    assert source.reader is SimpleITKIO


def test_images_of_plain_folders_are_for_the_pictures(folders):
    write(folders / "images" / "a_0000.nii.gz", 5)
    with pytest.raises(LoMixError, match="images has no b_0000.nii.gz"):
        read_plain(folders, images=folders / "images")
    write(folders / "images" / "b_0000.nii.gz", 6)
    source = read_plain(folders, images=folders / "images")
    assert [source.images[case] for case in "ab"] == [folders / "images" / f"{case}_0000.nii.gz" for case in "ab"]
    with pytest.raises(LoMixError, match="There is no folder .*pictures: check --images"):
        read_plain(folders, images=folders / "pictures")


def test_folders_of_one_name_are_told_apart_by_their_paths(folders):
    """Without --names nothing is a seed: equal names of folders say nothing about what is in them."""
    for run, own in (("runA", "old"), ("runB", "new")):
        shutil.copytree(folders / own, folders / run / "preds")
    assert read_plain(folders, "runA/preds", "runB/preds", "new").trainers == ["runA/preds", "runB/preds", "new"]


def test_one_folder_by_two_paths_is_no_second_seed(folders):
    (folders / "link").symlink_to(folders / "old", target_is_directory=True)
    for names in ((), ["o", "o", "n"]):
        with pytest.raises(UsageError, match="given twice with the same folder"):
            read_plain(folders, "old", "link", "new", names=names)
    twice = "old is given twice with the same folder: trainers and seeds are in different"
    with pytest.raises(UsageError, match=twice):
        read_plain(folders, "old", "old")


@pytest.mark.parametrize("wrong", ["new", "data/truth", "both"])
def test_images_instead_of_segmentations_are_recognised_by_their_names(folders, wrong):
    for folder in ("old", "new") if wrong == "both" else (wrong,):
        for case in "ab":
            (folders / folder / f"{case}.nii.gz").rename(folders / folder / f"{case}_0000.nii.gz")
    with pytest.raises(LoMixError, match="a_0000.*: _0000 marks images, so name the folder of the segmentations"):
        read_plain(folders)


def test_a_case_and_another_that_is_named_like_its_image_are_no_images(folders):
    for folder in ("old", "new"):
        shutil.copy(folders / folder / "a.nii.gz", folders / folder / "a_0000.nii.gz")
    with pytest.raises(LoMixError, match="truth has no reference of a_0000: add it, or remove the prediction"):
        read_plain(folders)


def test_cases_may_end_in_four_digits(folders):
    for folder in ("old", "new", "data/truth"):
        for case in "ab":
            (folders / folder / f"{case}.nii.gz").rename(folders / folder / f"{case}_0000.nii.gz")
    assert list(read_plain(folders).references) == ["a_0000", "b_0000"]


def test_refuses_folders_that_are_not_there_or_differ(folders):
    with pytest.raises(LoMixError, match="There is no folder .*newer: check --references and --predictions"):
        read_plain(folders, "old", "newer")
    for name, description in (("old", CLASSES), ("new", REGIONS)):
        (folders / name / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(LoMixError, match="labels of .*new"):
        read_plain(folders)


def test_refuses_references_without_labels(folders):
    for case in "ab":
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 6, 5), np.uint8)), folders / f"data/truth/{case}.nii.gz")
    with pytest.raises(LoMixError, match="nothing but background"):
        read_plain(folders)


def test_files_of_another_kind_are_told(folders):
    for file in (folders / "new").iterdir():
        file.rename(file.with_suffix("").with_suffix(".nii"))
    message = r"new has no file that ends in .nii.gz, as the references do, but a.nii, b.nii: convert them"
    with pytest.raises(LoMixError, match=message):
        read_plain(folders)


@pytest.mark.parametrize("intersection", [False, True])
def test_names_that_only_look_alike_are_told(folders, intersection):
    (folders / "old/a.nii.gz").rename(folders / "old" / f"{normalize('NFC', 'ü')}.nii.gz")
    (folders / "new/a.nii.gz").rename(folders / "new" / f"{normalize('NFD', 'ü')}.nii.gz")
    with pytest.raises(LoMixError, match="look like it and are made of other Unicode characters .*: rename its files"):
        read_plain(folders, intersection=intersection)


def test_a_dataset_json_of_windows_editors(folders):
    (folders / "data/dataset.json").write_text(json.dumps(CLASSES), encoding="utf-8-sig")
    assert list(read_plain(folders).labels) == ["liver", "tumour"]


def test_references_without_a_prediction_are_told(folders):
    write(folders / "data/truth/c.nii.gz", 3)
    told = "1 of 3 references have no prediction and don't count: c."
    assert list(read_plain(folders).references) == ["a", "b"] and read_plain(folders).notes == (told,)
    (folders / "new/b.nii.gz").unlink()  # which is predicted by the other one
    left_out = "1 of 2 cases are predicted by all; left out: b."
    assert read_plain(folders, intersection=True).notes == (left_out, told)
