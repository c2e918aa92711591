"""The trainers with the paper's network: by nnU-Net's own commands, and in this process on preprocessed data."""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch._dynamo import OptimizedModule

from nnunet_lomix import LoMixLoss, trainers
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.networks.alignment import output_strides
from nnunet_lomix.networks.network import EMCADNetwork
from nnunet_lomix.networks.pvt import VARIABLE
from nnunet_lomix.nnunet.network import check_network

from ..conftest import CASES, EXTERNAL_TRAINERS, SHAPE, UNVALIDATED
from .conftest import Tiny, assert_same

pytestmark = pytest.mark.end_to_end

MINE = """
from nnunet_lomix.trainers import nnUNetTrainerEMCADLoMix


class nnUNetTrainerEMCADLoMixTiny(Tiny, nnUNetTrainerEMCADLoMix):
    pass
"""


@pytest.fixture(autouse=True)
def no_weights_at_hand(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield
    shutil.rmtree(tmp_path)  # checkpoints of some hundred megabytes


def tiny(name, patch_size=(64, 64), **attributes):
    """One of our trainers, by name, for batches of two patches of any size."""

    class Small(Tiny):
        def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.configuration_manager.configuration |= {"batch_size": 2, "patch_size": list(patch_size)}

    return type(name, (Small, getattr(trainers, name)), attributes)


def train_steps(trainer, steps=2):
    trainer.network.train()
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        data = torch.randn(2, 1, *trainer.configuration_manager.patch_size, generator=generator)
        target = (data > 0).float() + (data > 1)
        strides = [[round(1 / s) for s in scale] for scale in trainer._get_deep_supervision_scales() or []]
        targets = [target[..., ::y, ::x] for y, x in strides]
        assert trainer.train_step({"data": data, "target": targets or target})["loss"] < 10


def test_train_and_predict(own_results, tmp_path):
    nnunet = own_results("classes")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.py").write_text((EXTERNAL_TRAINERS / "tiny_trainers.py").read_text() + MINE)
    variables = {"nnUNet_extTrainer": str(tmp_path / "mine"), "HF_HUB_CACHE": str(tmp_path / "cache"), **UNVALIDATED}
    trainer = ("-tr", "nnUNetTrainerEMCADLoMixTiny")
    output = nnunet.train(701, "2d", *trainer, **variables)
    assert "LoMix: 48 maps of 4 outputs" in output and "PVT-V2-B2 starts from random weights" in output

    image = nnunet.raw / "Dataset701_classes" / "imagesTs"
    options = ("-d", 701, "-c", "2d", "-i", image, "-o", tmp_path / "predicted", "-f", 0, "-npp", 1, "-nps", 1)
    nnunet.run("nnUNetv2_predict", *options, *trainer, "-device", "cpu", "--disable_tta", **variables)
    predicted = sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "predicted" / f"{CASES[-1]}.nii.gz"))
    assert predicted.shape == SHAPE and set(np.unique(predicted)) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "maps"),
    [
        ("nnUNetTrainerEMCAD", None),
        ("nnUNetTrainerEMCADLoMix", 48),
        ("nnUNetTrainerEMCADLoMixPaper", 48),
        ("nnUNetTrainerEMCADAdditiveMix", 15),
        ("nnUNetTrainerEMCADEqualDeepSupervision", 4),
    ],
)
def test_every_trainer_trains(make, name, maps):
    trainer = make(tiny(name))
    plain = getattr(trainers, name.replace("EMCAD", "")) if maps else None
    assert isinstance(trainer.loss, LoMixLoss if maps else DeepSupervisionWrapper)
    assert not maps or (len(trainer.loss.maps) == maps and issubclass(type(trainer), plain))
    assert not maps or trainer.loss.stride == plain.stride
    assert isinstance(trainer.network, EMCADNetwork)
    before = {name: p.clone() for name, p in [*trainer.network.named_parameters(), *trainer.loss.named_parameters()]}
    train_steps(trainer)
    after = dict([*trainer.network.named_parameters(), *trainer.loss.named_parameters()])
    assert all(p.isfinite().all() for p in after.values())
    unmoved = {name for name, p in after.items() if torch.equal(p, before[name])}
    # nnU-Net's deep supervision leaves out the coarsest output
    assert unmoved == ({f"decoder.seg_layers.0.{part}" for part in ("weight", "bias")} if maps is None else set())


def test_the_optimiser_is_the_papers(make):
    trainer = make(tiny("nnUNetTrainerEMCADLoMixPaper"))
    for epoch in (0, 3, 4):
        trainer.lr_scheduler.step(epoch)
        (group,) = trainer.optimizer.param_groups
        assert isinstance(trainer.optimizer, torch.optim.AdamW)
        assert (group["lr"], group["weight_decay"]) == (1e-4, 1e-4)
    assert {g["lr"] for g in trainer.loss_optimizer.param_groups} == {1e-4}
    assert {id(p) for p in group["params"]} == {id(p) for p in trainer.network.parameters()}


def test_a_single_output(make):
    trainer = make(tiny("nnUNetTrainerEMCADSingleOutput", (40, 36)))
    assert isinstance(trainer.loss, DC_and_CE_loss) and trainer._get_deep_supervision_scales() is None
    train_steps(trainer)
    assert trainer.network(torch.zeros(2, 1, 40, 36)).shape == (2, 3, 40, 36)
    coarse = list(trainer.network.decoder.seg_layers[:-1].parameters())
    assert coarse and all(p.grad is None for p in coarse)


@pytest.mark.parametrize("name", ["nnUNetTrainerEMCAD", "nnUNetTrainerEMCADLoMix"])
def test_any_patch_size(make, name):
    trainer = make(tiny(name, (44, 21)))
    assert trainer._get_deep_supervision_scales() == [[1, 1], [1 / 4, 1], [1 / 4, 1], [1 / 4, 1]]
    train_steps(trainer, 1)
    trainer.set_deep_supervision_enabled(False)
    assert trainer.network.eval()(torch.zeros(1, 1, 44, 21)).shape == (1, 3, 44, 21)
    trainer.set_deep_supervision_enabled(True)
    sizes = [z.shape[2:] for z in trainer.network(torch.zeros(1, 1, 44, 21))]
    assert sizes == [(44 // y, 21 // x) for y, x in output_strides((44, 21))]


def test_three_dimensions_are_refused_before_anything_is_written(make, tmp_path):
    for name in ("nnUNetTrainerEMCAD", "nnUNetTrainerEMCADLoMix"):
        with pytest.raises(SystemExit, match="EMCAD network is 2D, .* patches of .* x .* x .*: train .* 2d with it"):
            make(getattr(trainers, name), configuration="3d_fullres", initialize=False)
    assert not list(tmp_path.iterdir())
    configuration = make(trainers.nnUNetTrainerLoMix, configuration="3d_fullres", initialize=False)
    with pytest.raises(LoMixError, match="EMCAD network is 2D"):
        trainers.nnUNetTrainerEMCAD.build_network_architecture(None, configuration.configuration_manager, 1, 2)


def test_pretrained_weights_are_for_a_training_that_starts_anew(make, monkeypatch, tmp_path):
    source = EMCADNetwork(1, 3).encoder.model.state_dict()
    torch.save(source, tmp_path / "pvt.pth")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "pvt.pth"))
    first = make(tiny("nnUNetTrainerEMCADLoMix"))
    assert_same(dict(first.network.encoder.model.state_dict()), dict(source))
    with open(first.log_file) as log:
        assert f"The encoder PVT-V2-B2 starts from pretrained weights: {tmp_path / 'pvt.pth'}." in log.read()
    first.save_checkpoint(str(tmp_path / "checkpoint.pth"))

    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone.pth"))
    with pytest.raises(SystemExit, match="gone.pth is no file: name the weights of PVT-V2-B2"):
        make(tiny("nnUNetTrainerEMCAD"))
    # it isn't looked for to go on from a checkpoint, nor to predict
    second = make(tiny("nnUNetTrainerEMCADLoMix"), initialize=False)
    second.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert_same(first.network.state_dict(), second.network.state_dict())
    configuration = second.configuration_manager
    predicting = type(second).build_network_architecture(second.plans_manager, configuration, 1, 3, False)
    predicting.load_state_dict(first.network.state_dict())


def test_weights_of_a_training_with_other_classes(make, tmp_path):
    """By ``-pretrained_weights``: nnU-Net takes all but the heads."""
    source, trainer = EMCADNetwork(1, 9), make(tiny("nnUNetTrainerEMCAD"))
    torch.save({"network_weights": source.state_dict()}, tmp_path / "checkpoint.pth")
    heads = {key: w.clone() for key, w in trainer.network.state_dict().items() if ".seg_layers." in key}
    load_pretrained_weights(trainer.network, str(tmp_path / "checkpoint.pth"))
    assert_same(dict(trainer.network.state_dict()), {**source.state_dict(), **heads})


def test_a_compiled_network_gets_pretrained_weights(make, monkeypatch, tmp_path):
    source = EMCADNetwork(1, 3).encoder.model.state_dict()
    torch.save(source, tmp_path / "pvt.pth")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "pvt.pth"))
    trainer = make(tiny("nnUNetTrainerEMCADLoMix", _do_i_compile=lambda self: True))  # compiled when it is first used
    assert isinstance(trainer.network, OptimizedModule)
    assert_same(dict(trainer.network._orig_mod.encoder.model.state_dict()), dict(source))
    trainer.set_deep_supervision_enabled(False)
    assert not trainer.network._orig_mod.decoder.deep_supervision


def test_any_training_length_is_a_trainer(make):
    for name in trainers.__all__:
        if "EMCAD" in name:
            assert make(getattr(trainers, f"{name}_7epochs"), initialize=False).num_epochs == 7
            assert make(getattr(trainers, name), initialize=False).num_epochs == 1000


def test_export_names_the_way_to_hand_it_over(prepared):
    folder = prepared("classes").preprocessed / "Dataset701_classes"
    plans, dataset_json = (json.loads((folder / f"{name}.json").read_text()) for name in ("nnUNetPlans", "dataset"))
    checkpoint = {"trainer_name": "nnUNetTrainerEMCADLoMix", "init_args": {"configuration": "2d"}}
    with pytest.raises(LoMixError, match="has its own build_network_architecture; give it by nnUNetv2_export_model_to"):
        check_network(checkpoint, plans, dataset_json)


def test_the_modules_of_the_trainers_import_no_timm():
    """nnU-Net's look-up imports them, whichever trainer is asked for; a network is imported where it is built."""
    for file in Path(trainers.__file__).parent.glob("*.py"):
        at_the_top = [ast.unparse(node) for node in ast.parse(file.read_text()).body]
        imports = [line for line in at_the_top if line.startswith(("import", "from"))]
        assert imports or file.stem == "sentences"
        assert not [line for line in imports if "timm" in line or "networks" in line and ".alignment" not in line]
    alignment = Path(trainers.__file__).parents[1] / "nnunet_lomix" / "networks" / "alignment.py"
    assert "timm" not in alignment.read_text()
