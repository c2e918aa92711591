"""What was learned: numbers by hand, sentences, refusals."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from nnunet_lomix.cli import main
from nnunet_lomix.loss.maps import list_maps
from nnunet_lomix.nnunet.results import FoldFolder
from nnunet_lomix.weights import read, summary
from nnunet_lomix.weights.history import write_history

from ..nnunet.test_checkpoints import Malicious, a_checkpoint

# five maps, whose mean is 0.2
FIRST = {"z_0": 0.2, "z_1": 0.1, "add_0_1": 0.4, "multiply_0_1": 0.1, "add_0_2": 0.2}
SECOND = {"z_0": 0.2, "z_1": 0.14, "add_0_1": 0.36, "multiply_0_1": 0.06, "add_0_2": 0.24}


@pytest.fixture
def folds(tmp_path):
    """Writes the histories of the folds of a trainer; gives its folder."""

    def write(*histories, trainer="T__P__2d"):
        for i, history in enumerate(histories):
            folder = tmp_path / trainer / f"fold_{i}"
            folder.mkdir(parents=True)
            write_history(history, folder)
        return tmp_path / trainer

    return write


def run(*folders, out, fails=False):
    result = CliRunner().invoke(main, ["weights", *map(str, folders), "--out", str(out)], env={"COLUMNS": "200"})
    assert (result.exit_code != 0) == fails, result.output
    assert not fails or (isinstance(result.exception, SystemExit) and not out.exists()), result.exception
    return result.output


def frames(*lasts):
    return {f"fold_{i}": pd.DataFrame([last]) for i, last in enumerate(lasts)}


def test_shares_by_hand():
    histories = frames(FIRST, SECOND)
    maps, last = read.common_maps(histories), summary.last_weights(histories)
    scales = summary.shares(last, summary.scale_membership(maps))
    # scale 0 has all of z_0 and half of three maps, 1 all of z_1 and half of two, 2 half of one
    np.testing.assert_allclose(scales["equal"], [2.5 / 5, 2 / 5, 0.5 / 5])
    np.testing.assert_allclose(scales["low"], [0.53, 0.35, 0.1])
    np.testing.assert_allclose(scales["high"], [0.55, 0.35, 0.12])
    np.testing.assert_allclose(scales["mean"], [0.54, 0.35, 0.11])
    operators = summary.shares(last, summary.operator_membership(maps))
    assert list(operators.index) == ["original", "add", "multiply"]
    np.testing.assert_allclose(operators["equal"], [0.4, 0.4, 0.2])
    np.testing.assert_allclose(operators["mean"], [0.32, 0.6, 0.08])


@given(st.data())
def test_shares_are_shares_whatever_the_scale_of_the_weights(data):
    maps = list_maps(4, 3, ("add", "max"))
    values = data.draw(st.lists(st.floats(1e-3, 10), min_size=len(maps), max_size=len(maps)))
    last = {m.name: v for m, v in zip(maps, values, strict=True)}
    for membership in (summary.scale_membership(maps), summary.operator_membership(maps)):
        part = summary.shares(summary.last_weights(frames(last)), membership)
        np.testing.assert_allclose(part[["equal", "mean"]].sum(), 1)
        scaled = summary.shares(summary.last_weights(frames({k: 7 * v for k, v in last.items()})), membership)
        np.testing.assert_allclose(part, scaled)


def test_agreement_is_the_mean_of_all_pairs():
    third = dict(zip(FIRST, [0.6, 0.2, 0.05, 0.1, 0.06], strict=True))
    values = [list(fold.values()) for fold in (FIRST, SECOND, third)]
    expected = np.mean([spearmanr(values[a], values[b])[0] for a, b in ((0, 1), (0, 2), (1, 2))])
    last = summary.last_weights(frames(FIRST, SECOND, third))
    assert summary.agreement(last) == pytest.approx(expected)
    assert np.isnan(summary.agreement(last[["fold_0"]]))


@pytest.mark.parametrize("name", [m.name for m in list_maps(12, 4, ("add", "weighted_sum2"))])
def test_names_are_parsed(name):
    assert read.parse_map(name).name == name


def sentence(*lasts):
    histories = frames(*lasts)
    return summary.summarise(summary.last_weights(histories), read.common_maps(histories))


def test_sentences():
    names = [m.name for m in list_maps(3, 3, ("add", "max"))]
    equal = dict.fromkeys(names, 0.05)
    assert "no map differs from equal weights by more than 0.0 %" in sentence(equal, equal)
    # 0.053 against a mean of 0.0503
    slightly = equal | {"add_0_1": 0.053}
    assert "by more than 5.4 %" in sentence(slightly)
    strong = equal | {name: 0.1 for name in names if name.startswith("max")}
    text = sentence(strong)
    # of 11 maps 4 have twice as much: 0.1 / 0.0682
    assert "operator max gained most (+47 %), " in text and "least (−27 %)" in text and "one training" in text
    assert "heaviest map, max_" in text and "1.47 times" in text
    opposite = equal | {name: 0.1 for name in names if not name.startswith("max")}
    text = sentence(strong, opposite)  # the mean hides what each of them has
    assert text.startswith("Single trainings differ from equal weights by up to 47 %") and "told apart" not in text
    assert "do not agree on it, so take it for chance (mean correlation −1.00)" in text
    assert "trainings agree on it (mean correlation 1.00)" in sentence(strong, strong)
    assert "no agreement to speak of" in sentence(strong, equal)
    coarse = equal | {"z_2": 0.3}
    assert "scale 2 gained most" in sentence(coarse)


def test_files_and_terminal(folds, tmp_path):
    """Folds of unequal length, one of which began with a checkpoint of nnUNetTrainer."""
    trainer = folds([{}, FIRST, SECOND], [SECOND])
    out = tmp_path / "new" / "out"
    output = run(trainer, out=out)
    assert output.startswith("Against equal weights scale 2 gained most (+20 %)")
    assert "Spearman" in output and "split evenly" in output and "fold_1" in output
    assert (out / "weights.png").read_bytes().startswith(b"\x89PNG")
    table = pd.read_csv(out / "weights.csv")
    assert len(table) == 4 * 5 and list(table["map"][:5]) == list(FIRST)
    row = table[(table["fold"] == "fold_0") & (table["epoch"] == 1) & (table["map"] == "add_0_1")].iloc[0]
    assert row[["operator", "scales"]].tolist() == ["add", "0+1"]
    np.testing.assert_allclose(row[["weight", "share", "relative"]].astype(float), [0.4, 0.4, 2])
    assert table[table["epoch"] == 0]["weight"].isna().sum() == 5
    assert sorted(file.name for file in out.iterdir()) == ["weights.csv", "weights.png"]


def test_a_fold_that_has_just_begun_is_left_out(folds, tmp_path):
    trainer = folds([FIRST], [SECOND])
    (trainer / "fold_2").mkdir()
    output = run(trainer, out=tmp_path / "out")
    assert "Without fold_2: LoMix has not ended an epoch there." in output
    assert set(pd.read_csv(tmp_path / "out" / "weights.csv")["fold"]) == {"fold_0", "fold_1"}


def test_one_training_has_no_range(folds, tmp_path):
    output = run(folds([FIRST]), out=tmp_path / "out")
    assert " to " not in output.partition("share, %")[2].partition("A map's weight")[0]


def test_a_fold_alone_or_folds_of_several_trainers(folds, tmp_path):
    first, second = folds([FIRST]), folds([SECOND], trainer="U__P__2d")

    def names(*folders):
        return [f"{group}/{fold}" for group, own in read.find_groups(folders).items() for fold in own]

    assert names(first / "fold_0", first) == ["T/fold_0"]
    assert names(first, second) == ["T/fold_0", "U/fold_0"]
    third = folds([SECOND], trainer="T__P__3d")
    assert names(first, third) == ["T__P__2d/fold_0", "T__P__3d/fold_0"]
    seed = folds([SECOND], trainer="seed_1/T__P__2d")
    assert names(first, seed) == [f"{first.parent.name}/T__P__2d/fold_0", "seed_1/T__P__2d/fold_0"]


def test_checkpoints_serve_where_there_is_no_table(folds, tmp_path):
    trainer = folds([FIRST])
    expected = read.read_history(FoldFolder(trainer / "fold_0"))
    (trainer / "fold_0" / "lomix_weights.csv").unlink()
    torch.save(a_checkpoint(lomix={"rule": "equal", "history": [FIRST]}), trainer / "fold_0" / "checkpoint_latest.pth")
    np.testing.assert_allclose(read.read_history(FoldFolder(trainer / "fold_0")), expected)
    torch.save(a_checkpoint(), trainer / "fold_0" / "checkpoint_final.pth")
    assert "has no LoMix state" in run(trainer, out=tmp_path / "out", fails=True)


def test_a_malicious_checkpoint_is_refused(tmp_path):
    fold, written = tmp_path / "T" / "fold_0", tmp_path / "written"
    fold.mkdir(parents=True)
    torch.save(a_checkpoint(lomix={"history": Malicious(written)}), fold / "checkpoint_final.pth")
    assert "mkdir" in run(fold, out=tmp_path / "out", fails=True)
    assert not written.exists()


@pytest.mark.parametrize(
    "table, text",
    [
        ("", "can't be read"),
        ("a,b\n1,2", "can't be read"),
        ("epoch,z_0,foo\n0,1,2", "not a table of LoMix weights"),
        ("epoch,z_0,original_1\n0,1,2", "not a table of LoMix weights"),
        ("epoch,z_0\n0,1", "not a table of LoMix weights"),
        ("epoch,z_0,z_1\n0,1,many", "not a table of LoMix weights"),
        ("epoch,z_0,z_1\n", "not a table of LoMix weights"),
        ("epoch,z_0,z_1\n0,0.5,0.5\n1,,", "no weights for its last epoch"),
        ("epoch,z_0,z_1\n0,0.0,0.0", "no weights for its last epoch"),
    ],
)
def test_other_tables_are_refused(tmp_path, table, text):
    fold = tmp_path / "T" / "fold_0"
    fold.mkdir(parents=True)
    (fold / "lomix_weights.csv").write_text(table)
    assert text in run(fold, out=tmp_path / "out", fails=True)


def test_other_folders_are_refused(folds, tmp_path, monkeypatch):
    trainer = folds([FIRST], [{"z_0": 0.5, "z_1": 0.5}])
    assert "fold_0 and fold_1 have different maps" in run(trainer, out=tmp_path / "out", fails=True)
    (tmp_path / "empty" / "fold_0").mkdir(parents=True)
    assert "neither lomix_weights.csv nor a checkpoint" in run(tmp_path / "empty", out=tmp_path / "out", fails=True)
    assert f"{tmp_path} has no fold_X in it" in run(tmp_path / "empty" / "..", out=tmp_path / "out", fails=True)
    monkeypatch.chdir(tmp_path)
    assert f"Error: {tmp_path} has no fold_X in it" in run(".", out=tmp_path / "out", fails=True)


@pytest.fixture
def with_scarce_folds(folds, tmp_path, monkeypatch):
    """A model with folds 0 and 1, of 3 training cases, and two folds of 1 of them, as ``nnunet_lomix splits`` adds."""
    model = folds([FIRST], [FIRST], [SECOND], [SECOND], trainer="Dataset001_A/T__P__2d")
    splits = [
        {"train": ["a", "b", "c"], "val": ["d"]},
        {"train": ["b", "c", "d"], "val": ["a"]},
        {"train": ["c"], "val": ["d"]},
        {"train": ["a"], "val": ["d"]},
    ]
    preprocessed = tmp_path / "preprocessed" / "Dataset001_A"
    preprocessed.mkdir(parents=True)
    (preprocessed / "splits_final.json").write_text(json.dumps(splits))
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed.parent))
    return model


def test_scarce_folds_are_a_column_of_their_own(with_scarce_folds, tmp_path):
    output = run(with_scarce_folds, out=tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "weights.csv")
    assert dict(zip(table["fold"], table["group"], strict=True)) == {
        "fold_0": "T",
        "fold_1": "T",
        "fold_2": "T, 1 training cases",
        "fold_3": "T, 1 training cases",
    }
    # the sums have 0.6, two of five equal weights would be 0.4
    assert "T: Against equal weights" in output and "T, 1 training cases: Against equal weights" in output
    (row,) = (line.split() for line in output.splitlines() if line.startswith(" add "))
    assert row == ["add", "40.0", "60.0", "+50", "%", "60.0", "+50", "%"]


def test_models_are_columns_with_their_own_means(folds, tmp_path):
    """Before, T and U were pooled as if they were four folds of one training."""
    first, second = folds([FIRST], [SECOND]), folds([SECOND], [SECOND], trainer="U__P__2d")
    output = run(first, second, out=tmp_path / "out")
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.strip()}
    lines = [line.split() for line in output.splitlines()]
    header = lines.index(["operator", "equal,", "%", "share,", "%", "share,", "%"])
    assert lines[header - 1] == ["T", "U"]
    first_fold = lines.index(["T"]) + 1  # a row with the name of the group, and below it one for each fold
    assert [line[0] for line in lines[first_fold : first_fold + 2]] == ["fold_0", "fold_1"]
    # original: 0.3 and 0.34 in T, 0.34 in U, which has no range
    assert rows["original"] == ["40.0", "32.0", "(30.0", "to", "34.0)", "−20", "%", "34.0", "−15", "%"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["weights.csv", "weights.png"]


def test_models_with_different_maps_are_side_by_side(folds, tmp_path):
    """With other operators or another number of outputs; what equal weights give is then not the same for both."""
    first, second = folds([FIRST]), folds([{"z_0": 0.5, "z_1": 0.3, "max_0_1": 0.2}], trainer="U__P__2d")
    output = run(first, second, out=tmp_path / "out")
    assert "equal, %" not in output
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.strip()}
    assert rows["original"] == ["30.0", "−25", "%", "80.0", "+20", "%"]
    assert rows["max"] == ["20.0", "−40", "%"]


def test_unknown_splits_are_said_where_they_matter(folds, tmp_path, monkeypatch):
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    model = folds(*6 * [[FIRST]], trainer="Dataset001_A/T__P__2d")
    output = run(model, out=tmp_path / "out")
    assert "T is one column, though fold_5 may have fewer training cases than the other folds" in output
    assert "set nnUNet_preprocessed, in which Dataset001_A/splits_final.json says how many." in output
    assert "may have fewer" not in run(*(model / f"fold_{i}" for i in range(5)), out=tmp_path / "out")
    assert "may have fewer" not in run(model / "fold_5", out=tmp_path / "out")


@pytest.mark.parametrize("history", [[], [{}, {}]])
def test_a_checkpoint_that_lomix_only_saved_again_has_no_weights(folds, tmp_path, history):
    """A finished training of nnUNetTrainer, continued under LoMix's name, is only validated."""
    model = folds([FIRST])
    again = model / "fold_1"
    again.mkdir()
    torch.save(a_checkpoint(lomix={"rule": "barrier", "history": history}), again / "checkpoint_final.pth")
    assert "Without fold_1: LoMix has not ended an epoch there." in run(model, out=tmp_path / "out")
    output = run(again, out=tmp_path / "other", fails=True)
    assert f"{again / 'checkpoint_final.pth'} has no weights: LoMix has not ended an epoch there." in output


def test_an_output_that_is_not_utf_8(folds, tmp_path):
    """The sentence has a minus sign, which Windows' encoding of western Europe lacks."""
    runner = CliRunner(charset="cp1252")
    result = runner.invoke(main, ["weights", str(folds([FIRST])), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0 and "(?12 %)" in result.output, result.output
