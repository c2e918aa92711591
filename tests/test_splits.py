"""Data-scarce folds in nnU-Net's own file."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_lomix import splits
from nnunet_lomix.cli import main

NAMES = [f"case_{i:02}" for i in range(20)]


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A preprocessed dataset of 20 cases, empty files, without a split."""
    for variable in ("nnUNet_raw", "nnUNet_results"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    folder = tmp_path / "Dataset123_Few"
    (folder / "nnUNetPlans_2d").mkdir(parents=True)
    for name in NAMES:
        for ending in (".pkl", ".b2nd", "_seg.b2nd"):
            (folder / "nnUNetPlans_2d" / f"{name}{ending}").touch()
    return folder


def run(*args, fails=False):
    result = CliRunner().invoke(main, ["splits", *map(str, args)], terminal_width=200)
    assert (result.exit_code != 0) == fails, result.output
    assert not fails or isinstance(result.exception, SystemExit), result.exception
    return result.output


def read(dataset):
    return json.loads((dataset / "splits_final.json").read_text())


def stock_split(dataset):
    """What nnU-Net's own do_split writes."""
    trainer = object.__new__(nnUNetTrainer)
    trainer.dataset_class, trainer.fold = None, 0
    trainer.preprocessed_dataset_folder_base = str(dataset)
    trainer.preprocessed_dataset_folder = str(dataset / "nnUNetPlans_2d")
    trainer.folder_with_segs_from_previous_stage = None
    trainer.print_to_log_file = lambda *args, **kwargs: None
    trainer.do_split()
    return read(dataset)


def test_without_a_file_nnunets_own_split_comes_first(dataset):
    output = run("-d", 123, "--train-cases", 4)
    ours = read(dataset)
    (dataset / "splits_final.json").unlink()
    assert ours[:5] == stock_split(dataset)
    assert len(ours) == 8
    for fold in ours[5:]:
        assert len(fold["train"]) == 4 and set(fold["train"]) < set(ours[0]["train"])
        assert fold["val"] == ours[0]["val"]
    assert len({tuple(fold["train"]) for fold in ours[5:]}) == 3
    assert "drawn from fold 0 with seed 2" in output
    assert not list(dataset.glob("*backup*"))


def test_what_is_there_stays_and_is_backed_up(dataset):
    file = dataset / "splits_final.json"
    folds = [{"val": ["b", "a"], "train": ["é", *NAMES], "note": "mine"}, {"train": NAMES[:5], "val": ["z"]}]
    old = json.dumps(folds, indent=4).encode()
    file.write_bytes(old)
    run("-d", "Dataset123_Few", "--train-cases", 3, "--seeds", 1, "--fold", 1)
    assert file.read_bytes().startswith(old.removesuffix(b"\n]"))
    assert read(dataset)[2]["val"] == ["z"] and set(read(dataset)[2]["train"]) < set(NAMES[:5])
    second = file.read_bytes()
    run("-d", 123, "--train-cases", 2, "--seeds", 1, "--fold", 1)
    assert (dataset / "splits_final_backup_1.json").read_bytes() == old
    assert (dataset / "splits_final_backup_2.json").read_bytes() == second
    assert not list(dataset.glob("*.tmp"))


def test_twice_adds_nothing(dataset):
    run("-d", 123, "--train-fraction", 0.3)
    assert len(read(dataset)[-1]["train"]) == 5  # of 16, the nearest number
    before = {file: file.read_bytes() for file in dataset.glob("*.json")}
    output = run("-d", 123, "--train-fraction", 0.3)
    assert {file: file.read_bytes() for file in dataset.glob("*.json")} == before
    assert "Nothing to add" in output and "was there: drawn from fold 0 with seed 1" in output
    run("-d", 123, "--train-fraction", 0.3, "--seeds", 4)
    assert len(read(dataset)) == 9


def test_seeds_that_draw_alike_share_a_fold(dataset):
    (dataset / "splits_final.json").write_text(json.dumps([{"train": ["a", "b"], "val": ["c"]}]))
    output = run("-d", 123, "--train-cases", 1, "--seeds", 10)
    assert len(read(dataset)) == 3
    assert "Seeds that drew the same cases share a fold" in output


@given(st.sets(st.text(), min_size=1, max_size=30), st.integers(0, 10), st.data())
def test_drawing(cases, seed, data):
    """Deterministic, whatever the order; a smaller draw is part of a larger one."""
    shuffled = data.draw(st.permutations(sorted(cases)))
    count = data.draw(st.integers(1, len(cases)))
    drawn = splits.draw(shuffled, count, seed)
    assert drawn == splits.draw(sorted(cases), count, seed)
    assert len(set(drawn)) == count and set(drawn) <= cases
    assert set(splits.draw(shuffled, count - 1, seed)) < set(drawn)


def test_every_case_is_drawn_equally_often():
    counts = dict.fromkeys(NAMES, 0)
    for seed in range(2000):
        for case in splits.draw(NAMES, 5, seed):
            counts[case] += 1
    # binomial, p = 1/4: a standard deviation is 19.4
    assert np.abs(np.array(list(counts.values())) - 500).max() < 4 * 19.4


def test_draws_are_those_of_every_version():
    assert splits.draw(NAMES, 3, 0) == ["case_05", "case_09", "case_17"]


@pytest.mark.parametrize(
    "args, text",
    [
        ((), "either --train-cases or --train-fraction"),
        (("--train-cases", 2, "--train-fraction", 0.5), "either --train-cases or --train-fraction"),
        (("--train-cases", 0), "0 training cases can't be drawn from the 16 of fold 0"),
        (("--train-cases", 16), "16 training cases can't be drawn from the 16 of fold 0: 1 to 15 can"),
        (("--train-fraction", 0.01), "0 training cases (0.01 of them, rounded) can't be drawn from the 16 of fold 0"),
        (("--train-cases", 2, "--seeds", 1001), "1000 at most"),
        (("--train-fraction", "nan"), "between 0 and 1"),
        (("--train-fraction", 1.5), "between 0 and 1"),
        (("--train-cases", 2, "--fold", 5), "There is no fold 5"),
        (("--train-cases", 2, "--fold", -1), "There is no fold -1"),
        (("--train-cases", 2, "-d", 9), "Could not find a dataset with the ID 9: check -d and nnUNet_preprocessed"),
        (("--train-cases", 2, "-d", "Few"), "neither the number nor the name"),
        (("--train-cases", 2, "-d", "Dataset009_Few"), "Could not find a dataset Dataset009_Few: check -d and nnUNet_"),
        (("--train-cases", 2, "-d", "Dataset008_Raw"), "run nnUNetv2_plan_and_preprocess for it first"),
    ],
)
def test_mistakes_get_one_sentence_and_change_nothing(dataset, args, text, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path_factory.mktemp("raw")))
    Path(os.environ["nnUNet_raw"], "Dataset008_Raw").mkdir()
    assert text in run("-d", 123, *args, fails=True)
    assert os.listdir(dataset) == ["nnUNetPlans_2d"]


def test_half_a_character_is_a_name(dataset):
    """JSON can write it, and UTF-8 can't."""
    (dataset / "splits_final.json").write_text(json.dumps([{"train": ["\ud800", "b", "c"], "val": ["a"]}]))
    run("-d", 123, "--train-cases", 2)
    assert read(dataset)[0]["train"] == ["\ud800", "b", "c"]


def test_folders_that_are_not_ready(dataset, monkeypatch):
    (dataset / "splits_final.json").write_text('{"train": []}')
    assert "is not a list of folds" in run("-d", 123, "--train-cases", 2, fails=True)
    (dataset / "splits_final.json").unlink()
    (dataset / "nnUNetPlans_3d_fullres").mkdir()
    for ending in ("pkl", "b2nd"):
        (dataset / "nnUNetPlans_3d_fullres" / f"case_00.{ending}").touch()
    assert "different cases by configuration" in run("-d", 123, "--train-cases", 2, fails=True)
    monkeypatch.delenv("nnUNet_preprocessed")
    assert "nnUNet_preprocessed is not set" in run("-d", 123, "--train-cases", 2, fails=True)
