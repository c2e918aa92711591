"""What trainers refuse for a plan, without a training."""

import copy
import logging
import os

import pytest

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.commands import folders_below
from nnunet_lomix.nnunet.refusals import require_trainable
from nnunet_lomix.nnunet.registration import VARIABLE

from ..fuzz.world import DATASET_JSON, PLANS_JSON, write_json

OWN = """
from nnunet_lomix.trainers import nnUNetTrainerLoMix
class nnUNetTrainerShallow(nnUNetTrainerLoMix):
    mixed_scales = 9
class nnUNetTrainerAlone(nnUNetTrainerLoMix):
    def initialize(self):
        self.enable_deep_supervision = False
        super().initialize()
class nnUNetTrainerOnGPUs(nnUNetTrainerLoMix):
    def _build_loss(self):
        raise RuntimeError("no GPU")
"""


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> str:
    """Plans of a 2D and a 3D network with two outputs, for labels that are regions; results must stay empty."""
    folder = tmp_path / "preprocessed/Dataset009_Toy"
    two = copy.deepcopy(PLANS_JSON["configurations"]["2d"])
    two["architecture"]["arch_kwargs"] |= {"n_stages": 3, "strides": [[1, 1], [2, 2], [2, 2]]}
    three = copy.deepcopy(two) | {"patch_size": [8, 8, 8], "spacing": [1.0] * 3}
    three["architecture"]["arch_kwargs"] |= {"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]}
    write_json(folder / "nnUNetPlans.json", PLANS_JSON | {"configurations": {"2d": two, "3d_fullres": three}})
    labels = {"background": 0, "all": [1, 2], "tumour": 2}
    write_json(folder / "dataset.json", DATASET_JSON | {"labels": labels, "regions_class_order": [1, 2]})
    (tmp_path / "own").mkdir()
    (tmp_path / "own/mine.py").write_text(OWN)
    for name, value in folders_below(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(VARIABLE, f"{tmp_path / 'own'}{os.pathsep}{os.environ[VARIABLE]}")
    return "Dataset009_Toy"


@pytest.mark.parametrize(
    ("trainer", "sentence"),
    [
        ("nnUNetTrainerEMCAD", "^The EMCAD network is 2D, but this configuration has patches of"),
        ("nnUNetTrainerShallow", "^nnUNetTrainerShallow: mixed_scales must be between 1 and the"),
        ("nnUNetTrainerAlone", "^nnUNetTrainerAlone mixes several decoder outputs, but .* deep supervision"),
        # by an assertion of nnU-Net's
        ("nnUNetTrainerCELoss", "^nnUNetTrainerCELoss can't train Dataset009_Toy nnUNetPlans 3d_fullres: Assertion"),
    ],
)
def test_a_refusal_is_told(dataset, trainer, sentence):
    with pytest.raises(LoMixError, match=sentence):
        require_trainable(trainer, dataset, "nnUNetPlans", "3d_fullres")


def test_what_can_be_trained_leaves_nothing_behind(dataset, tmp_path, capsys):
    handlers = list(logging.getLogger("nnunet_lomix").handlers)
    environment = os.environ.copy()
    # what may come of this machine is left to the training
    for trainer in ("nnUNetTrainer", "nnUNetTrainerLoMix", "nnUNetTrainerOnGPUs"):
        require_trainable(trainer, dataset, "nnUNetPlans", "3d_fullres")
    assert os.environ == environment and not (tmp_path / "results").exists()
    assert logging.getLogger("nnunet_lomix").handlers == handlers and capsys.readouterr().out == ""
