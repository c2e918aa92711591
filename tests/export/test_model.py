"""The names of exported models, in nnU-Net's folders."""

import pytest
from nnunetv2.utilities.file_path_utilities import (
    get_output_folder,
    parse_dataset_trainer_plans_configuration_from_path,
)

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.export.model import name_model


def test_the_folder_is_nnunets(monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    expected = get_output_folder("Dataset904_A", "nnUNetTrainer", "Mine", "2d")
    assert str(tmp_path / name_model("Dataset904_A", "Mine", "2d")) == expected
    parsed = parse_dataset_trainer_plans_configuration_from_path(f"{expected}/fold_0")
    assert parsed == ("Dataset904_A", "nnUNetTrainer", "Mine", "2d")


@pytest.mark.parametrize(
    "dataset, plans, configuration, message",
    [(name, "Mine", "2d", "--dataset-name") for name in ("Shared", "Dataset4_a", "Dataset004_", "Dataset004_/a")]
    + [("Dataset001_/../../elsewhere", "Mine", "2d", "is no name of a dataset")]
    + [("Dataset004_A", name, "2d", "--plans-name") for name in ("", "a/b", "a\\b", "a__b")]
    + [("Dataset004_A", "Mine", "../2d", "configuration '../2d' can't be")],
)
def test_names_that_nnunet_does_not_find_or_that_lead_elsewhere_are_refused(dataset, plans, configuration, message):
    with pytest.raises(LoMixError, match=message):
        name_model(dataset, plans, configuration)
