"""The trainers in this process, on preprocessed generated data, on the device at hand."""

import functools
import logging
import os
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from torch._dynamo import OptimizedModule

from nnunet_lomix import LoMixLoss, trainers
from nnunet_lomix.loss import OPERATORS
from nnunet_lomix.trainers import lomix, nnUNetTrainerLoMix

from .conftest import LoMixTiny, StockTiny, Tiny, assert_same, assert_same_training, batch, log_of, train_steps

pytestmark = pytest.mark.end_to_end
ROOT = Path(__file__).parents[2]


def test_loss_parameters_have_a_learning_rate_of_their_own_and_no_weight_decay(make):
    """nnU-Net's scheduler writes its rate into every group of the optimiser that it is given."""
    trainer = make(LoMixTiny)
    trainer.current_epoch = 2
    trainer.on_train_epoch_start()
    assert trainer.optimizer.param_groups[0]["lr"] < 0.5 * trainer.initial_lr
    assert [g["lr"] for g in trainer.loss_optimizer.param_groups] == [1e-2, 1e-3]
    in_nnunets = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert in_nnunets.isdisjoint(map(id, trainer.loss.parameters()))
    before = {name: p.clone() for name, p in trainer.loss.named_parameters()}
    for p in trainer.loss.parameters():
        p.grad = torch.zeros_like(p)
    trainer.step_loss_optimizer(trainer.loss_optimizer)
    assert_same(before, dict(trainer.loss.named_parameters()))


def test_gradients_are_unscaled_under_mixed_precision(make):
    plain, scaled = (make(LoMixTiny, device=torch.device("cpu")) for _ in range(2))  # CUDA would autocast both
    # the scale doubles at the end of every step
    scaled.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1)
    for trainer in (plain, scaled):
        train_steps(trainer, 2)
    assert scaled.grad_scaler.get_scale() == 2.0**18
    for a, b in zip(plain.loss.parameters(), scaled.loss.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)


OTHERS = [  # than the default, LoMixTiny
    {"operators": ("add",)},
    {"operators": ("add", "fusion", "multiply", "concat")},  # the same parameters by name and shape
    {"mixed_scales": 2},
    {"rule": "softplus", "share": 0.0},
    {"anchor": "z_0"},
]
# earlier versions had a module for each map, and before that named no anchor; a rule had its steps as a number
EARLIER = [
    lambda state: state["loss"].update({"operators.concat.weight": torch.zeros(3, 9)}),
    lambda state: state.pop("anchor"),
    lambda state: state.update(loss={"rule._extra_state": {"steps": 2}}),
]


def test_a_checkpoint_of_another_loss_or_version_is_refused(make, tmp_path):
    file = tmp_path / "checkpoint.pth"
    trainer = make(LoMixTiny)
    trainer.save_checkpoint(str(file))
    sentence = "by LoMixTiny with other LoMix maps, or another rule or anchor.* by another version .* as it was written"
    for attributes in OTHERS:
        with pytest.raises(SystemExit, match=sentence):
            make(type("Other", (LoMixTiny,), attributes)).load_checkpoint(str(file))
    for change in EARLIER:
        checkpoint = torch.load(file, weights_only=False)
        change(checkpoint["lomix"])
        torch.save(checkpoint, tmp_path / "earlier.pth")
        with pytest.raises(SystemExit, match=sentence):
            trainer.load_checkpoint(str(tmp_path / "earlier.pth"))


def test_weights_reach_every_logger_of_nnunet_and_a_full_disk_does_not_end_a_training(make, monkeypatch):
    logged = {}

    class Recorder:
        def log(self, key, value, step):
            logged[key, step] = value

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(lomix, "plot_history", full)
    trainer = make(LoMixTiny)
    trainer.num_epochs = 1
    trainer.logger.loggers.append(Recorder())
    trainer.run_training()
    weights = logged[lomix.HISTORY, 0]
    assert set(weights) == {m.name for m in trainer.loss.maps}
    assert sum(weights.values()) == pytest.approx(1)
    assert "The LoMix weights could not be written: no space left on device" in log_of(trainer)


@pytest.mark.parametrize("value", [torch.nan, 1e25])  # AdamW keeps the squares: an infinite one would stay for ever
def test_a_step_that_is_left_out_leaves_no_trace_and_the_next_one_counts(make, value):
    skipping, smooth = make(LoMixTiny), make(LoMixTiny)
    for trainer in (skipping, smooth):
        train_steps(trainer)
    next(skipping.loss.parameters()).grad[0] = value
    skipping.step_loss_optimizer(skipping.loss_optimizer)
    for trainer in (skipping, smooth):
        for p in trainer.loss.parameters():
            p.grad = torch.ones_like(p)
        trainer.step_loss_optimizer(trainer.loss_optimizer)
    assert_same_training(dict(skipping.loss.named_parameters()), dict(smooth.loss.named_parameters()))
    assert_same_training(skipping.loss_optimizer.state_dict()["state"], smooth.loss_optimizer.state_dict()["state"])


def test_a_resumed_training_has_its_moments_and_the_settings_of_its_class(make, tmp_path):
    class Slower(LoMixTiny):
        weights_lr = 1e-5

    first = make(LoMixTiny)
    train_steps(first)
    first.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    for group in checkpoint["lomix"]["optimizer"]["param_groups"]:
        group["fused"] = None  # as it was before the step was decided on the device
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    second = make(Slower)
    second.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert [(g["lr"], g["fused"]) for g in second.loss_optimizer.param_groups] == [(1e-5, True), (1e-3, True)]
    assert_same(first.loss_optimizer.state_dict()["state"], second.loss_optimizer.state_dict()["state"])
    train_steps(second)


def test_a_stock_checkpoint_can_be_continued_or_pretrain_and_back(make):
    stock, ours, back = make(StockTiny), make(LoMixTiny), make(StockTiny)
    stock.num_epochs = ours.num_epochs = 1
    stock.run_training()
    final = os.path.join(stock.output_folder, "checkpoint_final.pth")
    load_pretrained_weights(ours.network, final)
    weights = stock.network.state_dict()
    assert all(torch.equal(p, weights[k]) for k, p in ours.network.state_dict().items() if "seg_layers" not in k)

    with pytest.raises(SystemExit, match="by StockTiny that has ended: .* -pretrained_weights"):
        ours.load_checkpoint(final)
    ours.num_epochs = 2
    ours.load_checkpoint(final)
    ours.run_training()
    assert "The checkpoint has no LoMix state" in log_of(ours)
    history = pd.read_csv(os.path.join(ours.output_folder, "lomix_weights.csv"))
    assert list(history["z_0"].isna()) == [True, False]

    back.load_checkpoint(os.path.join(ours.output_folder, "checkpoint_final.pth"))
    assert_same(back.network.state_dict(), ours.network.state_dict())
    back.run_training()
    assert back.current_epoch == 3


def test_a_dataset_without_foreground_is_refused(make):
    dataset_json = {"channel_names": {"0": "MRI"}, "labels": {"background": 0}, "file_ending": ".nii.gz"}
    with pytest.raises(SystemExit, match="Dataset701_classes has no label but the background: add one"):
        make(LoMixTiny, dataset_json=dataset_json)


def anchored(share: float) -> type:
    return type("Anchored", (LoMixTiny,), {"share": share})


@pytest.mark.parametrize("labels", ["classes", "ignore"])
def test_all_of_the_share_for_deep_supervision_is_nnunets_own_trainer_to_the_last_bit(make, labels):
    stock, ours = make(StockTiny, labels), make(anchored(1.0), labels)
    assert_same(stock.network.state_dict(), ours.network.state_dict())
    for step in range(4):
        assert_same(stock.train_step(batch(stock, step)), ours.train_step(batch(ours, step)))
    assert_same(stock.network.state_dict(), ours.network.state_dict())
    assert_same(stock.optimizer.state_dict(), ours.optimizer.state_dict())


def test_deep_supervision_and_the_maps_add_up(make):
    trainer, whole = make(anchored(0.25)), make(anchored(1.0))
    target = [t.to(trainer.device) for t in batch(trainer, 0)["target"]]
    outputs = [torch.randn(4, 3, *t.shape[2:], device=trainer.device) for t in target]
    deep_supervision = super(nnUNetTrainerLoMix, whole)._build_loss()(outputs, target)
    batch_dice = trainer.configuration_manager.batch_dice
    mixture = LoMixLoss(3, 3, share=0.0, stride=2, batch_dice=batch_dice).to(trainer.device)
    expected = 0.25 * deep_supervision + 0.75 * mixture(outputs, target)
    assert trainer.loss(outputs, target).item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(whole.loss(outputs, target), deep_supervision)
    assert float(trainer.loss.weights().sum()) == pytest.approx(1)
    assert set(trainer.loss.state_dict()) == set(mixture.state_dict())


def test_the_anchor_has_the_terms_of_the_maps(make):
    class OnlyDice(LoMixTiny):
        weight_ce, weight_dice = 0.0, 2.0

    loss, whole = make(OnlyDice, "ignore").loss, make(LoMixTiny, "ignore").loss
    z = [torch.randn(4, loss.num_classes, 64 // 2**j, 64 // 2**j) for j in range(3)]
    target = [torch.randint(2, (4, 1, *x.shape[2:])) for x in z]
    whole.anchor.loss.weight_ce = 0
    assert loss.anchor(z, target).item() == pytest.approx(2 * whole.anchor(z, target).item(), rel=1e-5)


@pytest.mark.parametrize(
    "setting, sentence",
    [
        ({"share": 1.2}, r"the share of the anchor must be between 0 and 1, got 1\.2"),
        ({"anchor": "z_1"}, "the anchor must be 'z_0' or 'deep_supervision', not 'z_1'"),
        ({"epochs": "ten"}, "epochs must be a whole number from 1 on, not 'ten'"),
        ({"epochs": 0}, "epochs must be a whole number from 1 on, not 0"),
        ({"seconds_between_checkpoints": None}, "seconds_between_checkpoints must be a number from 0 on, not None"),
        ({"weights_lr": float("nan")}, "weights_lr must be a number from 0 on, not nan"),
    ],
)
def test_a_setting_that_is_wrong_ends_with_a_sentence(make, setting, sentence):
    with pytest.raises(SystemExit, match=rf"^Wrong: {sentence}\.$"):
        make(type("Wrong", (LoMixTiny,), setting))


def test_a_misspelt_setting_is_told_in_the_log(make):
    log = log_of(make(type("Own", (LoMixTiny,), {"mixed_scale": 2, "operator": ["add"], "patience": 3})))
    assert "LoMix doesn't read mixed_scale of Own: is it mixed_scales?" in log
    assert "LoMix doesn't read operator of Own: is it operators?" in log and log.count("LoMix doesn't read") == 2


@pytest.mark.parametrize(
    "document, name, maps",
    [("docs/training.md", "nnUNetTrainerLoMixAdd", 11), ("docs/method.md", "nnUNetTrainerLoMixMin", 11)],
)
def test_the_subclasses_in_the_documents_train(make, document, name, maps):
    names, known = {}, set(OPERATORS)
    exec(re.search(r"```python\n(import torch\n.*?)```", (ROOT / document).read_text(), re.S)[1], names)
    try:
        trainer = make(type("Tiny", (Tiny, names[name]), {}))
        train_steps(trainer, 2)
        assert len(trainer.loss.maps) == maps
    finally:
        for added in set(OPERATORS) - known:
            del OPERATORS[added]


def test_any_training_length_is_a_trainer(make):
    for name in trainers.__all__:
        assert [getattr(trainers, name + length).epochs for length in ("", "_1epoch", "_20epochs")] == [None, 1, 20]
        assert not hasattr(trainers, f"{name}_0epochs") and not hasattr(trainers, f"{name}_epochs")
    assert not hasattr(trainers, "nnUNetTrainer_5epochs")
    for cls, epochs in ((trainers.nnUNetTrainerLoMix, 1000), (trainers.nnUNetTrainerEMCADLoMix_20epochs, 20)):
        assert make(cls, initialize=False).num_epochs == epochs


def test_a_compiled_network_trains_and_is_saved_without_prefix(make, monkeypatch, tmp_path):
    class Compiled(LoMixTiny):
        def _do_i_compile(self):
            return True

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    trainer, eager = make(Compiled), make(LoMixTiny)
    for t in (trainer, eager):
        train_steps(t)
    assert isinstance(trainer.network, OptimizedModule)
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert_same_training(dict(saved["network_weights"]), dict(eager.network.state_dict()))


def test_the_choice_of_a_backend_is_in_the_log_of_the_training_alone(make):
    application, logger = logging.NullHandler(), logging.getLogger("nnunet_lomix")
    logger.addHandler(application)
    try:
        first = make(LoMixTiny)
        first.log_file += ".first"  # nnU-Net names them by the second
        second = make(LoMixTiny)
        train_steps(second, 2)
        assert log_of(second).count("the backend 'plain' computes the loss of 19 maps") == 1
        assert not Path(first.log_file).exists()
        assert not logger.propagate  # and once on the console, though somebody may have set the root logger up
        assert application in logger.handlers
    finally:
        logger.removeHandler(application)
