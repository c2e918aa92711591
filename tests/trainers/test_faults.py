"""Numerical faults in real trainings: skipped, counted and named, or an end with a sentence; never a NaN network."""

from contextlib import contextmanager

import pytest
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.trainers import faults, nnUNetTrainerLoMix

from ..conftest import LABELS
from .conftest import LoMixTiny, Tiny, assert_same, assert_same_training, batch, log_of, train_steps

pytestmark = pytest.mark.end_to_end
CPU = torch.device("cpu")


@contextmanager
def broken_logits(trainer, value=torch.nan, scale=0):
    """The network's output of a scale has the value in one pixel of one class."""

    def break_one(network, inputs, outputs):
        broken = outputs[scale].clone()
        broken[0, 1, 0, 0] = value
        return [*outputs[:scale], broken, *outputs[scale + 1 :]]

    hook = trainer.network.register_forward_hook(break_one)
    yield
    hook.remove()


@contextmanager
def broken_gradients(trainer):
    """The loss is finite, but a gradient of the network isn't, as where it overflows in half precision."""
    parameter = next(trainer.network.parameters())
    hook = parameter.register_hook(lambda grad: grad * torch.inf)
    yield
    hook.remove()


def named(batch):
    """As nnU-Net's data loader gives it, which has the names of the cases."""
    return batch | {"keys": [f"case_{i}" for i in range(4)]}


def is_finite(trainer):
    tensors = [*trainer.network.state_dict().values(), *trainer.loss.state_dict().values()]
    return all(t.isfinite().all() for t in tensors if torch.is_tensor(t))


def assert_same_parts(a, b):
    for part in ("network", "optimizer", "loss_optimizer"):
        assert_same_training(getattr(a, part).state_dict(), getattr(b, part).state_dict())
    assert_same_training(dict(a.loss.named_parameters()), dict(b.loss.named_parameters()))


def test_the_scaler_for_a_cpu_changes_no_bit_of_a_training(make):
    ours, without = make(LoMixTiny, device=CPU), make(LoMixTiny, device=CPU)
    assert isinstance(ours.grad_scaler, faults.UnitScaler)
    without.grad_scaler = None
    for trainer in (ours, without):
        train_steps(trainer, 3)
    assert_same_parts(ours, without)
    assert ours.faults.step_was_made()


@pytest.mark.parametrize(
    ("value", "scale", "steps", "name"),
    [(torch.nan, 0, 4, "z_0"), (torch.nan, 0, 2, "the anchor"), (-torch.inf, 2, 2, "z_2")],
)
def test_a_step_on_broken_logits_leaves_no_trace(make, value, scale, steps, name):
    """Every fourth step the pixel is on the grid, whose maps then aren't finite; the anchor has all pixels."""
    broken, smooth = make(LoMixTiny), make(LoMixTiny)
    for trainer in (broken, smooth):
        train_steps(trainer, steps)
    with broken_logits(broken, value, scale):
        result = broken.train_step(named(batch(broken, 5)))
    assert not torch.tensor(result["loss"]).isfinite()
    assert_same_parts(broken, smooth)
    assert is_finite(broken)
    (fault,) = broken.faults.losses
    assert name in fault.parts and fault.cases == ["case_0", "case_1", "case_2", "case_3"]
    assert "z_0" not in fault.parts or name == "z_0"
    broken.loss.rule.steps -= 1  # the offset of the grid follows from it
    for trainer in (broken, smooth):
        train_steps(trainer)
    assert_same_parts(broken, smooth)


def test_a_training_goes_on_after_faults_and_its_log_counts_and_names_them(make):
    class Faulty(LoMixTiny):
        def train_step(self, batch):
            if self.current_epoch == 0:
                return super().train_step(batch)
            with broken_gradients(self) if self.current_epoch == 1 else broken_logits(self, torch.nan, 2):
                return super().train_step(named(batch))

        def validation_step(self, batch):
            with broken_logits(self, torch.inf if self.current_epoch == 0 else 0.0):
                return super().validation_step(batch)

    trainer = make(Faulty)
    trainer.run_training()
    log = log_of(trainer)
    assert log.count("training steps were left out, as their gradients weren't finite") == 2
    assert "Epoch 1: 2 of 2 training steps were left out" in log
    assert "Epoch 2: 2 of 2 training steps were left out" in log
    assert "Epoch 2: losses in training that weren't finite: 2; maps: z_2, add_0_2, add_1_2, add_0_1_2, " in log
    assert "more; cases: case_0, case_1, case_2, case_3." in log
    assert "Epoch 0: losses in validation that weren't finite: 2; maps: z_0, " in log
    assert "sample 3 of the batch" in log  # a data loader that names no cases
    assert is_finite(trainer)


@pytest.mark.parametrize("step, value", [("train_step", torch.nan), ("validation_step", torch.inf)])
def test_an_image_that_is_not_finite_ends_the_training(make, step, value):
    trainer = make(LoMixTiny)
    before = {name: t.clone() for name, t in trainer.network.state_dict().items()}
    broken = named(batch(trainer, 0))
    broken["data"][2, 0, 5, 5] = value
    trainer.current_epoch = 3
    with pytest.raises(LoMixError, match=r"^Epoch 3: the preprocessed image of case_2 has values that are NaN or inf"):
        getattr(trainer, step)(broken)
    assert "the preprocessed image of case_2 has values" in log_of(trainer)
    assert_same(before, dict(trainer.network.state_dict()))


@pytest.mark.parametrize(
    "step, labels, value, sentence",
    [
        ("train_step", "classes", 7, "the target has the label 7, but the 3 classes are 0 to 2"),
        ("validation_step", "regions_ignore", 2, "the target has the value 2, but regions are 0 or 1"),
    ],
)
def test_a_label_that_is_none_ends_the_training(make, step, labels, value, sentence):
    regions = {"regions_class_order": [1, 2]} if "regions" in labels else {}
    dataset_json = {"channel_names": {"0": "MRI"}, "labels": LABELS[labels], "file_ending": ".nii.gz", **regions}
    trainer = make(LoMixTiny, dataset_json=dataset_json)
    broken = named(batch(trainer, 0))
    if regions:
        broken["target"] = [torch.cat([t > 0, t > 1, t < 0], 1).float() for t in broken["target"]]
    broken["target"][0][1, 0, 5, 5] = value
    with pytest.raises(LoMixError, match=rf"^Epoch 0, case_1: {sentence}"):
        getattr(trainer, step)(broken)


def test_other_errors_keep_their_traceback(make):
    trainer = make(LoMixTiny)
    broken = named(batch(trainer, 0))
    broken["target"][0] = broken["target"][0][:, :, 1:]
    with pytest.raises(ValueError, match="the size of the target"):
        trainer.train_step(broken)


def test_overflow_under_autocast(make):
    """nnU-Net trains in half precision on CUDA alone; here the network does so on any device."""
    trainer = make(LoMixTiny)
    network = trainer.network
    half = torch.autocast(trainer.device.type, torch.float16)
    network.forward = half(network.forward)
    train_steps(trainer)
    assert trainer.faults.losses == [] and is_finite(trainer)
    with torch.no_grad():
        network.decoder.seg_layers[-1].weight.mul_(1e6)  # logits beyond 65504, the greatest number of float16
    before = {name: t.clone() for name, t in network.state_dict().items()}
    trainer.train_step(named(batch(trainer, 1)))
    assert "z_0" in trainer.faults.losses[0].parts
    assert_same(before, dict(network.state_dict()))


def test_steps_that_are_left_out_one_after_the_other_end_the_training(make, monkeypatch):
    assert faults.MOST_IN_A_ROW == 25
    monkeypatch.setattr(faults, "MOST_IN_A_ROW", 3)
    trainer = make(LoMixTiny)
    for epoch, rows in enumerate([(2, 2), (3,)]):
        trainer.current_epoch, results = epoch, []
        trainer.on_train_epoch_start()
        for row in rows:
            with broken_gradients(trainer):
                results += [trainer.train_step(batch(trainer, 0)) for _ in range(row)]
            results.append(trainer.train_step(batch(trainer, 0)))  # a good one
        # a scale that was halved at each would be 0 after some hundred steps in the course of a training
        assert trainer.device.type == "cuda" or trainer.grad_scaler.get_scale() == 1
        if epoch == 0:
            trainer.on_train_epoch_end(results)
        else:
            with pytest.raises(LoMixError, match="^Epoch 1: 3 training steps one after the other were left out.* --c;"):
                trainer.on_train_epoch_end(results)
    log = log_of(trainer)
    assert "Epoch 0: 4 of 6 training steps were left out" in log
    assert "Epoch 1: 3 of 4 training steps were left out" in log
    assert "Epoch 1: 3 training steps one after the other" in log
    assert is_finite(trainer)


def test_without_a_scaler_the_first_fault_ends_the_training(make):
    """nnU-Net has none on MPS, so the step was made, and the network is lost; a validation makes none."""
    trainer = make(LoMixTiny)
    trainer.grad_scaler = None
    with broken_logits(trainer):
        trainer.network.eval()
        trainer.validation_step(batch(trainer, 0))
        with pytest.raises(
            LoMixError, match="^Epoch 0: the loss wasn't finite in the maps the anchor, .*sample 3.* is lost"
        ):
            train_steps(trainer)


def test_no_checkpoint_of_what_is_not_finite(make, tmp_path):
    """Of running statistics, too, which change in the forward pass, so that leaving out a step doesn't help."""
    with_batch_norm = recursive_find_trainer_class_by_name("nnUNetTrainerBN")
    trainer = make(type("Tiny", (Tiny, with_batch_norm, nnUNetTrainerLoMix), {}))
    network, file = trainer.network, tmp_path / "checkpoint.pth"
    trainer.save_checkpoint(str(file))
    before = file.read_bytes()
    for named in (network.named_parameters(), trainer.loss.named_parameters(), network.named_buffers()):
        name, tensor = next(named)
        pixel = tensor.data.view(-1)[:1]
        value = pixel.clone()
        pixel.fill_(torch.nan)
        sentence = f"^Epoch 0: .*{name} of the network or its loss .* so .*point.pth was not"
        with pytest.raises(LoMixError, match=sentence):
            trainer.save_checkpoint(str(file))
        pixel.copy_(value)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.glob("checkpoint*")] == ["checkpoint.pth"]


def test_a_training_moves_between_a_cpu_and_cuda_with_the_scale_of_each(make, tmp_path):
    trainer = make(LoMixTiny, device=CPU)
    train_steps(trainer)
    file = tmp_path / "checkpoint.pth"
    trainer.save_checkpoint(str(file))
    checkpoint = torch.load(file, weights_only=False)
    assert checkpoint["grad_scaler_state"] is None  # nnU-Net on CUDA keeps its own scale then
    cuda = torch.amp.GradScaler("cpu")  # the default of all devices
    cuda.scale(torch.ones(()))
    torch.save(checkpoint | {"grad_scaler_state": cuda.state_dict()}, file)
    second = make(LoMixTiny, device=CPU)
    second.load_checkpoint(str(file))
    assert second.grad_scaler.get_scale() == 1
