"""Finding, pairing and refusing files, in trees like those that nnU-Net leaves; the command."""

import json
import os
import re
import shutil
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_lomix.compare import compare, read_folders, read_results
from nnunet_lomix.errors import LoMixError, UsageError
from tests.compare.trees import CLASSES, DATASET, MEAN_CLASS, REGIONS, write


def read(*trainers: str, **options):
    return read_results("9", "2d", trainers or ("A", "B"), **options)


def test_pairs_cases_of_all_folds(trees):
    _, b = trees.add("A", 1), trees.add("B", 2)
    source = read()
    assert list(source.predictions) == [("A", 0), ("B", 0)] and source.trainers == ["A", "B"]
    assert source.predictions["B", 0]["c"] == b / "fold_1" / "validation" / "c.nii.gz"
    assert {case: file.name for case, file in source.references.items()} == {c: f"{c}.nii.gz" for c in "abc"}
    assert source.labels == {"liver": (1,), "tumour": (2,)} and source.ignore is None
    assert source.reader is SimpleITKIO and source.folds == ("0", "1") and not source.notes
    assert list(read(folds=["0"]).references) == ["a", "b"]


def test_regions_and_ignored_label(trees):
    for trainer in "AB":
        trees.add(trainer, description=REGIONS)
    source = read()
    assert source.labels == {"all": (1, 2), "tumour": (2,)} and source.ignore == 3


def test_several_results_folders_are_seeds(trees):
    for results in ("first", "second"):
        for trainer in "AB":
            trees.add(trainer, results=results)
    source = read(results=["first", "second"])
    assert list(source.predictions) == [("A", 0), ("A", 1), ("B", 0), ("B", 1)]
    assert "second" in str(source.predictions["B", 1]["a"])


def test_equal_names_are_seeds(trees):
    for seed, trainer in enumerate(("A0", "B0", "A1", "B1")):
        trees.add(trainer, seed)
    source = read("A0", "B0", "A1", "B1", names=["A", "B", "A", "B"])
    assert list(source.predictions) == [("A", 0), ("A", 1), ("B", 0), ("B", 1)]
    assert "B1__" in str(source.predictions["B", 1]["a"])


def test_references_and_images_of_the_raw_dataset(trees):
    trees.add("A"), trees.add("B")
    write(trees.folder / "raw" / DATASET / "imagesTr" / "b_0000.nii.gz", 0)
    assert list(read().images) == ["b"]
    shutil.move(
        trees.folder / "preprocessed" / DATASET / "gt_segmentations", trees.folder / "raw" / DATASET / "labelsTr"
    )
    assert {file.parent.name for file in read().references.values()} == {"labelsTr"}


def test_intersection_compares_common_cases_and_names_the_others(trees):
    trees.add("A")
    (trees.add("B") / "fold_0" / "validation" / "a.nii.gz").unlink()
    with pytest.raises(LoMixError, match=r"B__.*lacks.* a: .*--intersection"):
        read()
    source = read(intersection=True)
    assert list(source.references) == ["b", "c"] and all(list(own) == ["b", "c"] for own in source.predictions.values())
    assert source.notes == ("2 of 3 cases are predicted by all; left out: a.",)


def remove_fold(trees):
    shutil.rmtree(trees.add("B") / "fold_1")


def remove_case(trees):
    (trees.add("B") / "fold_1" / "validation" / "c.nii.gz").unlink()


def swap_folds(trees):
    folds = trees.add("B")
    for case, (old, new) in {"b": "01", "c": "10"}.items():
        shutil.move(folds / f"fold_{old}/validation/{case}.nii.gz", folds / f"fold_{new}/validation/{case}.nii.gz")


def repeat_case(trees):
    folder = trees.add("B")
    shutil.copy(folder / "fold_0/validation/a.nii.gz", folder / "fold_1/validation/a.nii.gz")


def remove_reference(trees):
    trees.add("B")
    (trees.folder / "preprocessed" / DATASET / "gt_segmentations" / "c.nii.gz").unlink()


def remove_references(trees):
    trees.add("B")
    shutil.rmtree(trees.folder / "preprocessed" / DATASET / "gt_segmentations")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda trees: None, r"no 'B__nnUNetPlans__2d' in .*; did you mean A__nnUNetPlans__2d\?"),
        (swap_folds, r"different splits: b, c"),
        (repeat_case, r"a is validated in folds 0 and 1 of .*B__"),
        (remove_reference, r"gt_segmentations has no reference of c"),
        (remove_references, rf"no references.*{DATASET}/gt_segmentations"),
        (lambda trees: trees.add("B", spacing=(2.0, 2.0)), r"spacing of .*B__.*\[2.0, 2.0\].*A__.*\[1.0, 1.0\]"),
        (lambda trees: trees.add("B", patch_size=[64, 64]), r"planned patch_size of .*B__.*\[64, 64\].*A__"),
        (lambda trees: [trees.add(t, description=MEAN_CLASS) for t in "AB"], r"No class can be called mean"),
        (lambda trees: trees.add("B", description=REGIONS), r"labels of .*B__.*all.*A__.*liver"),
        (lambda trees: (trees.add("B") / "plans.json").unlink(), r"B__.*plans.json isn't there"),
        (lambda trees: (trees.add("B") / "dataset.json").write_text("{"), r"B__.*dataset.json can't be read"),
        (
            lambda trees: (trees.add("B") / "dataset.json").write_text("{}"),
            r"dataset.json is not nnU-Net's: .*labels, file_ending",
        ),
    ],
)
def test_refuses_what_differs_by_name(trees, damage, message):
    trees.add("A")
    damage(trees)
    for options in ({}, {"intersection": True}):
        with pytest.raises(LoMixError) as error:
            read(**options)
        assert re.search(message, str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [remove_fold, remove_case])
def test_folds_that_not_all_have_are_refused_or_left_out_by_name(trees, damage):
    trees.add("A")
    damage(trees)
    with pytest.raises(LoMixError, match=r"B__.* no validation of fold 1: .*-f, or .*--intersection"):
        read()
    source = read(intersection=True)
    assert source.folds == ("0",) and list(source.references) == ["a", "b"]
    assert source.notes == ("Compared are the folds that all have, 0; left out: 1 (not in B__nnUNetPlans__2d).",)
    with pytest.raises(LoMixError, match=r"no validation of fold 4"):  # nobody has that one
        read(intersection=True, folds=["0", "4"])


def test_what_nnunet_can_validate_is_told_from_what_must_be_trained(trees):
    """nnUNetv2_train --val loads checkpoint_final.pth, which an untrained or interrupted fold hasn't."""
    trees.add("A")
    remove_fold(trees)
    fold = trees.folder / "results" / DATASET / "B__nnUNetPlans__2d" / "fold_1"
    with pytest.raises(
        LoMixError, match="train with nnUNetv2_train, as B__nnUNetPlans__2d/fold_1 isn't trained to the end"
    ):
        read()
    fold.mkdir()
    (fold / "checkpoint_final.pth").touch()
    with pytest.raises(LoMixError, match="no validation of fold 1: run nnUNetv2_train with --val, choose"):
        read()


def test_a_results_folder_in_the_home(trees, monkeypatch):
    for trainer in "AB":
        trees.add(trainer)
    monkeypatch.setenv("HOME", str(trees.folder))
    assert read(results=["~/results"]).trainers == ["A", "B"]


def test_folds_are_numbers_or_all(trees):
    for trainer in "AB":
        trees.add(trainer)
    assert read(folds=["00", "1"]).folds == ("0", "1")
    with pytest.raises(UsageError, match="^-f takes numbers or all, separated by spaces, not '0,1'.$"):
        read(folds=["0,1"])


def test_a_validation_by_an_earlier_checkpoint_is_none(trees):
    """Trained again to the end, and the validation interrupted."""
    trees.add("A")
    trees.add("B")
    (trees.folder / "results" / DATASET / "B__nnUNetPlans__2d" / "fold_1" / "checkpoint_final.pth").touch()
    advice = "the checkpoint of B__nnUNetPlans__2d/fold_1 is newer than its validation: run nnUNetv2_train with --val"
    with pytest.raises(LoMixError, match=f"no validation of fold 1: {advice}"):
        read()
    assert read(intersection=True).folds == ("0",)


def test_without_a_common_fold_there_is_nothing_to_compare(trees):
    for trainer, fold in (("A", "0"), ("B", "1")):
        shutil.rmtree(trees.add(trainer) / f"fold_{fold}")
    with pytest.raises(LoMixError, match=r"No fold is validated in all of .*A__.*B__"):
        read(intersection=True)


def test_full_and_scarce_folds_are_told_apart(trees):
    """Scarce folds have the validation cases of the fold that they are drawn from."""
    for trainer in "AB":
        model = trees.add(trainer)
        for fold, scarce in (("0", "2"), ("0", "3"), ("1", "10")):
            shutil.copytree(model / f"fold_{fold}", model / f"fold_{scarce}")
    with pytest.raises(LoMixError, match=r"a is validated in folds 0 and 2 .*: choose -f 0 1, or -f 2 10, or -f 3\.$"):
        read()
    assert read(folds=["2", "10"]).folds == ("2", "10")


def test_fold_all_is_taken_only_if_asked_for(trees):
    for trainer in "AB":
        model = trees.add(trainer)
        shutil.copytree(model / "fold_0", model / "fold_all")
    assert read().folds == ("0", "1")
    assert "validated on the cases that it was trained with" in read(folds=["all"]).notes[0]
    for trainer in "AB":
        for fold in "01":
            shutil.rmtree(trees.folder / "results" / DATASET / f"{trainer}__nnUNetPlans__2d" / f"fold_{fold}")
    with pytest.raises(LoMixError, match="ask for it by -f all"):
        read()


def test_folds_that_are_wanted_must_be_there(trees):
    trees.add("A"), trees.add("B")
    with pytest.raises(LoMixError, match="no validation of fold 4"):
        read(folds=["0", "4"])


def test_cases_that_no_trainer_has_validated_are_missed(trees):
    trees.add("A"), trees.add("B")
    splits = [{"train": ["c"], "val": ["a", "b"]}, {"train": ["a", "b"], "val": ["c", "d"]}]
    file = trees.folder / "preprocessed" / DATASET / "splits_final.json"
    file.write_text(json.dumps(splits))
    with pytest.raises(LoMixError, match=r"No validation of fold 1 has d, though .* run nnUNetv2_train"):
        read()
    assert list(read(intersection=True).references) == ["a", "b", "c"]
    assert list(read(folds=["0"]).references) == ["a", "b"]


@pytest.mark.parametrize(
    "names, results, message",
    [
        (["A", "A"], ["results"], "All 2 are called A, which makes them seeds of one trainer: give each its --names"),
        (["A"], ["results"], "a name for each of the 2 --trainers, not 1"),
        ((), ["results", "results"], "A is given twice with the same folder"),
        (["A"] * 2, ["results", "results"], "A is given twice with the same folder"),
    ],
)
def test_refuses_wrong_names(trees, names, results, message):
    trees.add("A"), trees.add("B")
    with pytest.raises(UsageError, match=message):
        read(names=names, results=results)


@pytest.mark.parametrize("dataset", ["Dataset009_Toi", "Dataset09_Toy", "toy"])
def test_a_typo_of_the_dataset_gets_a_suggestion(trees, dataset):
    trees.add("A"), trees.add("B")
    with pytest.raises(LoMixError, match=rf"; did you mean {DATASET}\?$"):
        read_results(dataset, "2d", ["A", "B"])


def test_a_results_folder_without_the_dataset_is_named(trees):
    trees.add("A"), trees.add("B")
    with pytest.raises(LoMixError, match=rf"There is no {DATASET} in the results folder empty: .*--results\.$"):
        read(results=["results", "empty"])


def test_numbers_of_seeds_may_differ(trees):
    trees.add("A", 1), trees.add("B", 2), trees.add("C", 3)
    result = compare(read("A", "B", "C", names=["A", "B", "A"]))
    (row,) = result.comparison.query("metric == 'Dice' and `class` == 'mean'").to_dict("records")
    assert len(row["by_seed"]) == 1 and len(row["reference_by_seed"]) == 2
    assert [len(folders) for folders in result.information["folders"].values()] == [2, 1]


def test_refuses_unknown_datasets_and_missing_variables(trees, monkeypatch):
    with pytest.raises(LoMixError, match="Could not find a dataset with the ID 77: check -d, nnUNet_prep"):
        read_results("77", "2d", ["A", "B"])
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(LoMixError, match="nnUNet_results is not set"):
        read_results(DATASET, "2d", ["A", "B"])


def train(fold: Path, name: str = "checkpoint_final.pth", **more):
    """A checkpoint with the log of two epochs; a third one has begun."""
    log = {
        "mean_fg_dice": [np.float32(0.5), np.float64("nan")],
        "train_losses": [np.float32(-0.25), np.float32(-0.5)],
        "epoch_start_timestamps": [1000.0, 1200.0, 1300.0],
        "epoch_end_timestamps": [1118.25, 1261.0],
    }
    checkpoint = {
        "network_weights": {"w": torch.zeros(2)},
        "trainer_name": "A",
        "init_args": {"configuration": "2d"},
        "current_epoch": 2,
        "logging": log,
    }
    torch.save(checkpoint | more, fold / name)
    os.utime(fold / name, (1300, 1300))  # before the validation


def test_curves_are_those_of_the_checkpoints(trees):
    fold = trees.add("A") / "fold_1"
    trees.add("B")
    train(fold)
    source = read()
    expected = pd.DataFrame(
        [("A", 0, "1", 0, 0.5, -0.25, 118.25), ("A", 0, "1", 1, np.nan, -0.5, 61.0)],
        columns=["trainer", "seed", "fold", "epoch", "pseudo_dice", "train_loss", "seconds"],
    )
    pd.testing.assert_frame_equal(source.curves, expected)
    assert compare(source).information["epoch_seconds"] == {"A": (118.25 + 61) / 2}


def test_without_checkpoints_there_are_no_curves(trees):
    trees.add("A"), trees.add("B")
    source = read()
    assert source.curves.empty and not source.notes
    assert compare(source).information["epoch_seconds"] == {}


def test_a_checkpoint_that_cannot_be_used_costs_only_its_curves(trees):
    """Trainers of others may save what no checkpoint of nnU-Net has; their predictions can be scored all the same."""
    train(trees.add("A") / "fold_0", settings=Path("anything"))
    train(trees.add("B") / "fold_0")
    source = read()
    assert set(source.curves["trainer"]) == {"B"}
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


def test_folders_of_one_name_are_seeds(folders):
    for name in ("old2", "new2"):
        shutil.copytree(folders / name[:-1], folders / name)
    source = read_plain(folders, "old", "old2", "new", "new2", names=["o", "o", "n", "n"])
    assert list(source.predictions) == [("o", 0), ("o", 1), ("n", 0), ("n", 1)]


def test_folders_of_one_name_are_told_apart_by_their_paths(folders):
    """Without --names nothing is a seed: equal names of folders say nothing about what is in them."""
    for run, own in (("runA", "old"), ("runB", "new"), ("runC", "old")):
        shutil.copytree(folders / own, folders / run / "preds")
    assert read_plain(folders, "runA/preds", "runB/preds", "new").trainers == ["runA/preds", "runB/preds", "new"]
    assert read_plain(folders, "runA/preds", "runB/preds", "runC/preds").trainers == ["runA", "runB", "runC"]


def test_one_folder_by_two_paths_is_no_second_seed(folders):
    (folders / "link").symlink_to(folders / "old", target_is_directory=True)
    for names in ((), ["o", "o", "n"]):
        with pytest.raises(UsageError, match="given twice with the same folder"):
            read_plain(folders, "old", "link", "new", names=names)
    with pytest.raises(
        UsageError, match="old is given twice with the same folder: trainers and seeds are in different"
    ):
        read_plain(folders, "old", "old")


@pytest.mark.parametrize("wrong", ["new", "data/truth", "both"])
def test_images_instead_of_segmentations_are_recognised_by_their_names(folders, wrong):
    for folder in ("old", "new") if wrong == "both" else (wrong,):
        for case in "ab":
            (folders / folder / f"{case}.nii.gz").rename(folders / folder / f"{case}_0000.nii.gz")
    with pytest.raises(LoMixError, match="a_0000.*: _0000 marks images, so name the folder of the segmentations"):
        read_plain(folders)


def test_cases_may_end_in_four_digits(folders):
    for folder in ("old", "new", "data/truth"):
        for case in "ab":
            (folders / folder / f"{case}.nii.gz").rename(folders / folder / f"{case}_0000.nii.gz")
    assert list(read_plain(folders).references) == ["a_0000", "b_0000"]


def test_references_without_predictions_are_left_out(folders):
    write(folders / "data" / "truth" / "c.nii.gz", 0)
    assert list(read_plain(folders).references) == ["a", "b"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "new" / "b.nii.gz").unlink(), r"new lacks cases that others have, b"),
        (lambda f: (f / "data/truth/b.nii.gz").unlink(), r"truth has no reference of b"),
        (lambda f: shutil.rmtree(f / "new"), r"no folder .*new"),
        (
            lambda f: [
                (f / n / "dataset.json").write_text(json.dumps(d)) for n, d in (("old", CLASSES), ("new", REGIONS))
            ],
            r"labels of .*new",
        ),
    ],
)
def test_refuses_folders_that_differ_by_name(folders, damage, message):
    damage(folders)
    with pytest.raises(LoMixError) as error:
        read_plain(folders)
    assert re.search(message, str(error.value))


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
    for folder in ("new", "old", "data/truth"):
        for file in (folders / folder).iterdir():
            file.rename(file.with_suffix(".BMP"))
    with pytest.raises(LoMixError, match="must have files of one kind that nnU-Net reads, not a.*BMP, b.*BMP: set"):
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
    assert read_plain(folders).notes == (told,)
    (folders / "new/b.nii.gz").unlink()  # which is predicted by the other one
    left_out = "1 of 2 cases are predicted by all; left out: b."
    assert read_plain(folders, intersection=True).notes == (left_out, told)
