"""The trainers with the paper's network, with a smaller encoder."""

import ast
import functools
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from timm.models.pvt_v2 import pvt_v2_b2
from torch._dynamo import OptimizedModule

from nnunet_lomix import LoMixLoss, trainers
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.networks import pvt
from nnunet_lomix.networks.alignment import output_strides
from nnunet_lomix.networks.emcad import EMCADNetwork
from nnunet_lomix.nnunet.registration import register
from nnunet_lomix.nnunet.results import FINAL, LATEST

from .conftest import Tiny, assert_same, batch, log_of, send_behind, train_steps

pytestmark = pytest.mark.end_to_end


@pytest.fixture(autouse=True)
def small_encoder_and_no_weights_at_hand(monkeypatch, tmp_path):
    small = functools.partial(pvt_v2_b2, depths=(1, 1, 1, 1), mlp_ratios=(1, 1, 1, 1))
    monkeypatch.setattr(pvt, "pvt_v2_b2", small)
    monkeypatch.delenv(pvt.VARIABLE, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield
    shutil.rmtree(tmp_path)  # large checkpoints


def tiny(name, patch_size=(32, 32), **attributes):
    """One of our trainers, by name, for batches of two patches of any size."""

    class Small(Tiny):
        samples = 2

        def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.configuration_manager.configuration["patch_size"] = list(patch_size)

    return type(name, (Small, getattr(trainers, name)), attributes)


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
    if maps is None:
        assert isinstance(trainer.loss, DeepSupervisionWrapper)
    else:
        plain = getattr(trainers, name.replace("EMCAD", ""))
        assert issubclass(type(trainer), plain)
        assert (len(trainer.loss.maps), trainer.loss.stride) == (maps, plain.stride)
        assert trainer.loss.criterion.paper_dice == (name != "nnUNetTrainerEMCADLoMix")  # of the paper's table
    assert isinstance(trainer.network, EMCADNetwork)
    before = {name: p.clone() for name, p in [*trainer.network.named_parameters(), *trainer.loss.named_parameters()]}
    train_steps(trainer, 2)
    after = dict([*trainer.network.named_parameters(), *trainer.loss.named_parameters()])
    assert all(p.isfinite().all() for p in after.values())
    unmoved = {name for name, p in after.items() if torch.equal(p, before[name])}
    # nnU-Net's deep supervision leaves out the coarsest output
    assert unmoved == ({f"decoder.seg_layers.0.{part}" for part in ("weight", "bias")} if maps is None else set())


def test_the_optimiser_is_the_papers(make):
    trainer = make(tiny("nnUNetTrainerEMCADLoMixPaper"))
    for epoch in (0, 2, 3):
        trainer.lr_scheduler.step(epoch)
        (group,) = trainer.optimizer.param_groups
        assert isinstance(trainer.optimizer, torch.optim.AdamW)
        assert (group["lr"], group["weight_decay"]) == (1e-4, 1e-4)
    assert {g["lr"] for g in trainer.loss_optimizer.param_groups} == {1e-4}
    assert {id(p) for p in group["params"]} == {id(p) for p in trainer.network.parameters()}


def test_a_single_output(make):
    trainer = make(tiny("nnUNetTrainerEMCADSingleOutput", (40, 36)))
    assert trainer._get_deep_supervision_scales() is None
    step = batch(trainer, 0)
    z = trainer.network(step["data"]).detach()
    expected = LoMixLoss(3, 2, (), weight_ce=0.3, weight_dice=0.7, paper_dice=True).losses([z, z], step["target"])
    torch.testing.assert_close(trainer.loss(z, step["target"]), expected[0])
    train_steps(trainer, 2)
    assert trainer.network(torch.zeros(2, 1, 40, 36)).shape == (2, 3, 40, 36)
    coarse = list(trainer.network.decoder.seg_layers[:-1].parameters())
    assert coarse and all(p.grad is None for p in coarse)


@pytest.mark.parametrize("name", ["nnUNetTrainerEMCAD", "nnUNetTrainerEMCADLoMix"])
def test_any_patch_size(make, name):
    trainer = make(tiny(name, (44, 21)))
    assert trainer._get_deep_supervision_scales() == [[1, 1], [1 / 4, 1], [1 / 4, 1], [1 / 4, 1]]
    train_steps(trainer)
    sizes = [z.shape[2:] for z in trainer.network(torch.zeros(1, 1, 44, 21))]
    assert sizes == [(44 // y, 21 // x) for y, x in output_strides((44, 21))]
    trainer.set_deep_supervision_enabled(False)
    assert trainer.network.eval()(torch.zeros(1, 1, 44, 21)).shape == (1, 3, 44, 21)


def test_a_step_that_is_not_finite_is_left_out_and_named(make):
    """Of nnU-Net's own loss, which names no maps."""
    trainer = make(tiny("nnUNetTrainerEMCAD"))
    train_steps(trainer)
    before = {key: w.clone() for key, w in trainer.network.named_parameters()}
    head = trainer.network.decoder.seg_layers[-1]
    hook = head.register_forward_hook(lambda module, inputs, z: z * torch.nan)
    result = trainer.train_step(batch(trainer, 1) | {"keys": ["case_a", "case_b"]})
    hook.remove()
    assert_same(before, dict(trainer.network.named_parameters()))
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([result])
    log = log_of(trainer)
    assert "losses in training that weren't finite: 1; maps: the loss; cases: case_a, case_b." in log
    assert "Epoch 0: 1 of 1 training steps were left out" in log
    for value, field, sentence in [(torch.inf, "data", "image of sample 1 of"), (7, "target", "sample 1 .* label 7")]:
        broken = batch(trainer, 0)
        (broken["data"] if field == "data" else broken["target"][0])[1, 0, 5, 5] = value
        with pytest.raises(LoMixError, match=sentence):
            trainer.train_step(broken)


def test_a_signal_leaves_a_checkpoint_to_go_on_from_and_nnunet_predicts(make):
    cls = tiny("nnUNetTrainerEMCAD")
    first = make(cls)
    send_behind(first, "train_step")
    with pytest.raises(SystemExit) as ended:
        first.run_training()
    assert ended.value.code == 128 + signal.SIGTERM
    second = make(cls, initialize=False)
    second.load_checkpoint(str(Path(first.output_folder, LATEST)))
    second.num_epochs = 1
    for part in ("network", "optimizer"):
        assert_same(getattr(first, part).state_dict(), getattr(second, part).state_dict())
    second.run_training()
    assert second.optimizer.state_dict()["state"][0]["step"] == 1 + 2

    register()  # so that nnU-Net finds the trainer of that name
    predictor = nnUNetPredictor(use_mirroring=False, device=second.device, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(second.output_folder_base, (0,), FINAL)
    image = np.random.default_rng(0).normal(size=(1, 3, 40, 40)).astype(np.float32)
    predicted = predictor.predict_single_npy_array(image, {"spacing": [1, 1, 1]})
    assert predicted.shape == (3, 40, 40) and set(np.unique(predicted)) <= {0, 1, 2}


def test_three_dimensions_are_refused_before_anything_is_written(make, tmp_path):
    for name in ("nnUNetTrainerEMCAD", "nnUNetTrainerEMCADLoMix"):
        with pytest.raises(SystemExit, match="EMCAD network is 2D, .* patches of .* x .* x .*: train .* 2d with it"):
            make(getattr(trainers, name), configuration="3d_fullres", initialize=False)
    assert not list(tmp_path.iterdir())


def test_pretrained_weights_are_for_a_training_that_starts_anew(make, monkeypatch, tmp_path):
    source = EMCADNetwork(1, 3).encoder.model.state_dict()
    torch.save(source, tmp_path / "pvt.pth")
    monkeypatch.setenv(pvt.VARIABLE, str(tmp_path / "pvt.pth"))
    first = make(tiny("nnUNetTrainerEMCADLoMix", _do_i_compile=lambda self: True))  # compiled when it is first used
    assert isinstance(first.network, OptimizedModule)
    network = first.network._orig_mod
    assert_same(dict(network.encoder.model.state_dict()), dict(source))
    assert f"The encoder PVT-V2-B2 starts from pretrained weights: {tmp_path / 'pvt.pth'}." in log_of(first)
    first.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    first.set_deep_supervision_enabled(False)
    assert not network.decoder.deep_supervision

    monkeypatch.setenv(pvt.VARIABLE, str(tmp_path / "gone.pth"))
    with pytest.raises(SystemExit, match="gone.pth is no file: name the weights of PVT-V2-B2"):
        make(tiny("nnUNetTrainerEMCAD"))
    # it isn't looked for to go on from a checkpoint, nor to predict
    second = make(tiny("nnUNetTrainerEMCADLoMix"), initialize=False)
    second.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert_same(network.state_dict(), second.network.state_dict())
    type(second).build_network_architecture(second.plans_manager, second.configuration_manager, 1, 3, False)


def test_weights_of_a_training_with_other_classes(make, tmp_path):
    """By ``-pretrained_weights``: nnU-Net takes all but the heads."""
    source, trainer = EMCADNetwork(1, 9), make(tiny("nnUNetTrainerEMCAD"))
    torch.save({"network_weights": source.state_dict()}, tmp_path / "checkpoint.pth")
    heads = {key: w.clone() for key, w in trainer.network.state_dict().items() if ".seg_layers." in key}
    load_pretrained_weights(trainer.network, str(tmp_path / "checkpoint.pth"))
    assert_same(dict(trainer.network.state_dict()), {**source.state_dict(), **heads})


def test_the_modules_of_the_trainers_import_no_timm():
    """nnU-Net's look-up imports them, whichever trainer is asked for; a network is imported where it is built."""
    for file in Path(trainers.__file__).parent.glob("*.py"):
        at_the_top = [ast.unparse(node) for node in ast.parse(file.read_text()).body]
        imports = [line for line in at_the_top if line.startswith(("import", "from"))]
        assert imports and not [line for line in imports if "networks" in line and ".alignment" not in line]
    alignment = Path(trainers.__file__).parents[1] / "nnunet_lomix" / "networks" / "alignment.py"
    assert "timm" not in alignment.read_text()
