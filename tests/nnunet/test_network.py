"""Which networks nnUNetTrainer builds, and that nothing that plans name is run before."""

import copy

import pytest
import torch

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.network import check_network

from ..fuzz.world import DATASET_JSON, PLANS_JSON, make_checkpoint


@pytest.fixture
def model():
    """A checkpoint, its plans and its dataset.json, to spoil."""
    return make_checkpoint("nnUNetTrainerLoMix", "0"), copy.deepcopy(PLANS_JSON), DATASET_JSON


def refuse(checkpoint, plans, dataset_json, message):
    with pytest.raises(LoMixError, match=message):
        check_network(checkpoint, plans, dataset_json)


def test_other_networks_are_refused(model):
    checkpoint, plans, dataset_json = model
    weights = checkpoint["network_weights"]
    assert check_network(*model) == "its class and its weights"
    more = checkpoint | {"network_weights": weights | {"more": torch.zeros(1)}}
    refuse(more, plans, dataset_json, "their weights differ in name or shape")
    # the same weights, but another network may be around them
    other = checkpoint | {"trainer_name": "nnUNetTrainerBN"}
    refuse(other, plans, dataset_json, "has its own build_network_architecture")
    refuse(checkpoint | {"init_args": {"configuration": "4d"}}, plans, dataset_json, "no configuration '4d'")


@pytest.mark.parametrize(
    "name", ["os.mkdir", "torch.nn.modules.module.warnings.os.mkdir", "torch.nn.init.zeros_", "torch.nn.Parameter", 3]
)
def test_code_in_plans_is_refused_and_not_run(model, tmp_path, name):
    """nnU-Net calls what the plans name, with arguments from the plans."""
    checkpoint, plans, dataset_json = model
    architecture = plans["configurations"]["2d"]["architecture"]
    architecture["arch_kwargs"] |= {"nonlin": name, "nonlin_kwargs": {"path": str(tmp_path / "written")}}
    refuse(checkpoint, plans, dataset_json, f"{name} is not part of nnU-Net")
    assert not (tmp_path / "written").exists()
    architecture["network_class_name"] = "antigravity.Network"
    refuse(checkpoint, plans, dataset_json, "antigravity.Network is not part of nnU-Net")


def test_a_trainer_that_is_not_installed_is_not_one_that_cannot_be_looked_up(model, tmp_path, monkeypatch):
    checkpoint, plans, dataset_json = model
    checkpoint["trainer_name"] = "nnUNetTrainerOfSomebody"
    only = "its weights only, since "
    assert check_network(*model) == f"{only}nnUNetTrainerOfSomebody isn't installed here"
    (tmp_path / "mine.py").write_text("import no_such_package")
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    reason = "nnU-Net's look-up of trainers failed: ModuleNotFoundError: No module named 'no_such_package'"
    assert check_network(*model) == only + reason
