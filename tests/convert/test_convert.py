"""What is the same for all downloads: folds, numbers, folders that appear whole."""

import pytest
from click.testing import CliRunner

from nnunet_lomix.cli import main
from nnunet_lomix.convert import DATASETS, convert
from nnunet_lomix.errors import LoMixError

from .downloads import refuse, require_nothing

LEVELS = {
    "synapse": ("RawData", "RawData/Training"),
    "acdc": ("database", "database/training"),
    "polyp": ("CVC-ClinicDB",),
}


@pytest.mark.parametrize("kind", LEVELS)
def test_any_folder_of_the_download_will_do(whole, kind):
    """What is found is the same; finding doesn't write."""
    expected = DATASETS[kind](whole[kind])
    for level in LEVELS[kind]:
        found = DATASETS[kind](whole[kind] / level)
        assert found.cases == expected.cases and found.train == expected.train and found.test == expected.test


def test_the_command(whole, nnunet):
    """The folds are where nnU-Net looks for them, too."""
    result = CliRunner().invoke(main, ["convert", "synapse", str(whole["synapse"]), "-d", "77"], terminal_width=200)
    assert result.exit_code == 0, result.output
    assert "nnUNetv2_plan_and_preprocess -d 77 --verify_dataset_integrity\n" in result.stdout
    assert "5 % of them, seed 0" in result.stdout and not result.stderr
    raw, beside = (root / "Dataset077_Synapse" for root in (nnunet.raw, nnunet.preprocessed))
    assert [file.name for file in beside.iterdir()] == ["splits_final.json"]
    assert (beside / "splits_final.json").read_text() == (raw / "splits_final.json").read_text()
    assert sorted(file.name for file in raw.iterdir()) == ["dataset.json", "imagesTr", "labelsTr", "splits_final.json"]
    result = CliRunner().invoke(main, ["convert", "acdc", str(whole["synapse"])])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1


@pytest.mark.parametrize("root", ["raw", "preprocessed", "results"])
def test_a_number_that_is_taken(whole, nnunet, root):
    taken = getattr(nnunet, root) / "Dataset601_Other"
    taken.mkdir(parents=True)
    with pytest.raises(LoMixError, match="There is a dataset 601, .*Dataset601_Other: give another number by -d"):
        convert("synapse", whole["synapse"])
    assert not list(nnunet.folder.rglob("*Synapse*"))


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
