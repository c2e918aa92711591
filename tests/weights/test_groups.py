"""Which folds are pooled: never those of two models, nor folds with few and with all training cases."""

import json

import pytest

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.weights.groups import read_groups
from nnunet_lomix.weights.history import write_history

from .test_history import WEIGHTS

SPLITS = [
    {"train": ["a", "b", "c"], "val": ["d"]},
    {"train": ["b", "c", "d"], "val": ["a"]},
    {"train": ["c"], "val": ["d"]},
    {"train": ["a"], "val": ["d"]},
]


def names(*folders):
    groups, _ = read_groups(folders)
    return {group.name: list(group.histories) for group in groups}


def test_models_are_apart_by_the_shortest_name(model):
    first, second, third = model(*2 * [[WEIGHTS]]), model([WEIGHTS], name="U__P__2d"), model([WEIGHTS], name="T__P__3d")
    assert names(first / "fold_1", first) == {"T": ["fold_1", "fold_0"]}
    assert names(first, second) == {"T": ["fold_0", "fold_1"], "U": ["fold_0"]}
    assert list(names(first, third)) == ["T__P__2d", "T__P__3d"]
    seed = model([WEIGHTS], name="seed_1/T__P__2d")
    assert list(names(first, seed)) == ["T__P__2d", "seed_1/T__P__2d"]


def test_scarce_folds_are_apart(model, tmp_path, monkeypatch):
    """Two folds of 3 training cases, and two of 1 of them, as ``nnunet_lomix splits`` adds."""
    preprocessed = tmp_path / "preprocessed" / "Dataset001_A"
    preprocessed.mkdir(parents=True)
    (preprocessed / "splits_final.json").write_text(json.dumps(SPLITS))
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed.parent))
    assert names(model(*5 * [[WEIGHTS]])) == {
        "T": ["fold_0", "fold_1", "fold_4"],
        "T, 1 training cases": ["fold_2", "fold_3"],
    }


def test_unknown_splits_are_said_where_they_matter(model):
    folder = model(*6 * [[WEIGHTS]])
    groups, notes = read_groups([folder])
    assert len(groups) == len(notes) == 1
    assert "T is one column, though fold_5 may have fewer training cases than the other folds" in notes[0]
    assert "set nnUNet_preprocessed, in which Dataset001_A/splits_final.json says how many." in notes[0]
    assert read_groups([folder / f"fold_{i}" for i in range(5)])[1] == read_groups([folder / "fold_5"])[1] == []


def test_a_fold_that_has_just_begun_is_left_out(model):
    folder = model([WEIGHTS])
    (folder / "fold_1").mkdir()
    groups, notes = read_groups([folder])
    assert [list(group.histories) for group in groups] == [["fold_0"]]
    assert notes == [f"Without {folder / 'fold_1'}: LoMix has not ended an epoch there."]
    with pytest.raises(LoMixError, match="LoMix has not ended an epoch in .*fold_1"):
        read_groups([folder / "fold_1"])


def test_other_folders_are_refused(model, tmp_path, monkeypatch):
    folder = model([WEIGHTS])
    (folder / "fold_1").mkdir()
    write_history([{"z_0": 0.5, "z_1": 0.5}], folder / "fold_1")
    with pytest.raises(LoMixError, match="fold_0 and fold_1 of T have different maps"):
        read_groups([folder])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoMixError, match=f"{tmp_path} has no fold_X in it"):
        read_groups(["."])
