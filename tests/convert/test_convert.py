"""What is the same for all downloads: folds, numbers, folders that appear whole, nnU-Net's own check."""

import pytest
from click.testing import CliRunner

from nnunet_lomix.cli import main
from nnunet_lomix.convert import DATASETS, convert
from nnunet_lomix.errors import LoMixError

from .downloads import refuse, require_nothing, write_synapse

LEVELS = {
    "synapse": ("", "RawData", "RawData/Training"),
    "acdc": ("", "database", "database/training"),
    "polyp": ("", "CVC-ClinicDB"),
}


@pytest.mark.parametrize("kind, level", [(kind, level) for kind, levels in LEVELS.items() for level in levels[1:]])
def test_any_folder_of_the_download_will_do(whole, kind, level):
    """What is found is the same; finding doesn't write."""
    found, expected = (DATASETS[kind](folder) for folder in (whole[kind] / level, whole[kind]))
    assert found.cases == expected.cases and found.train == expected.train and found.test == expected.test


def test_folds_are_where_nnunet_looks_for_them(whole, nnunet):
    raw = convert("synapse", whole["synapse"], 77)
    beside = nnunet.preprocessed / "Dataset077_Synapse"
    assert [file.name for file in beside.iterdir()] == ["splits_final.json"]
    assert (beside / "splits_final.json").read_text() == (raw / "splits_final.json").read_text()
    assert sorted(file.name for file in raw.iterdir()) == ["dataset.json", "imagesTr", "labelsTr", "splits_final.json"]


@pytest.mark.parametrize("root", ["raw", "preprocessed", "results"])
def test_a_number_that_is_taken(whole, nnunet, root):
    taken = getattr(nnunet, root) / "Dataset601_Other"
    taken.mkdir(parents=True)
    with pytest.raises(LoMixError, match="There is a dataset 601, .*Dataset601_Other: give another number by -d"):
        convert("synapse", whole["synapse"])
    assert not list(nnunet.folder.rglob("*Synapse*"))
    convert("synapse", whole["synapse"], 611)


def test_the_command(whole, nnunet):
    result = CliRunner().invoke(main, ["convert", "synapse", str(whole["synapse"])], terminal_width=200)
    assert result.exit_code == 0, result.output
    assert "nnUNetv2_plan_and_preprocess -d 601 --verify_dataset_integrity\n" in result.stdout
    assert "against the test cases" in result.stdout and not result.stderr
    result = CliRunner().invoke(main, ["convert", "acdc", str(whole["synapse"])])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_whatever_ends_it_leaves_nothing(whole, nnunet, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("nnunet_lomix.convert.write_splits", fail)
    with pytest.raises(type(error)):
        convert("synapse", whole["synapse"])
    require_nothing(nnunet)


def test_without_variables(whole, nnunet, monkeypatch):
    monkeypatch.delenv("nnUNet_preprocessed")
    refuse("synapse", whole["synapse"], nnunet, "nnUNet_preprocessed is not set")


@pytest.mark.end_to_end
def test_nnunet_plans_what_was_converted(tmp_path, nnunet):
    """Its check of the dataset passes, and it keeps our folds."""
    raw = convert("synapse", write_synapse(tmp_path / "download", (4, 32, 32)))
    options = ("-d", 601, "-npfp", 1, "--verify_dataset_integrity", "--no_pp")
    output = nnunet.run("nnUNetv2_plan_and_preprocess", *options, nnUNet_n_proc_DA="1")
    assert "your dataset is most likely OK" in output and "WARNING" not in output
    beside = nnunet.preprocessed / raw.name
    assert (beside / "nnUNetPlans.json").is_file()
    assert (beside / "splits_final.json").read_text() == (raw / "splits_final.json").read_text()
