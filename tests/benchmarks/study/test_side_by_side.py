"""Trainings side by side: their steps are those of the trainers, their batches of nnU-Net's kind."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_lomix.loss.criterion import ClassCriterion

Make = Callable[..., nnUNetTrainer]
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: there are no graphs here")


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import side_by_side

    monkeypatch.setattr(side_by_side, "TRAINED", "2d")
    return side_by_side


@pytest.fixture
def make(harness: ModuleType, prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes an initialised trainer of an arm, always with the same first network."""
    nnunet = prepared("classes")
    budget = {"seed": 3, "epochs": 4, "iterations": 2, "optimiser": "sgd"}
    variables = {"nnUNet_results": str(tmp_path), "nnUNet_n_proc_DA": "0", "NNUNET_LOMIX_STUDY": json.dumps(budget)}
    for name, value in {**nnunet.variables, **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_compile", "f")
    folder = nnunet.preprocessed / "Dataset701_classes"
    return lambda arm, device="cpu": harness.make_trainer(arm, folder, device=device)


def make_patches(trainer: nnUNetTrainer, seed: int = 0) -> Any:
    from patches import Cases, Patches

    return Patches(Cases.load(trainer, list(trainer.do_split()[0])), trainer, seed)


def state(trainer: nnUNetTrainer) -> dict[str, torch.Tensor]:
    return {**trainer.network.state_dict(), **dict(trainer.loss.named_parameters(prefix="loss"))}


# Steps


@pytest.mark.parametrize("arm", ["nnUNetTrainer", "SingleOutput", "barrier", "stride_2", "Paper"])
@pytest.mark.parametrize("on_device", [False, True])
def test_steps_are_those_of_the_trainer(arm: str, on_device: bool, make: Make, harness: ModuleType) -> None:
    """The same network, loss, optimiser and schedule; with an optimiser that a graph can hold, but for rounding."""
    ours, theirs = make(arm), make(arm)
    before = {name: tensor.clone() for name, tensor in state(ours).items()}
    if on_device:
        for optimizer in filter(None, [ours.optimizer, getattr(ours, "loss_optimizer", None)]):
            harness.keep_on_device(optimizer)
    patches = make_patches(ours)
    for epoch in range(2):
        for trainer in (ours, theirs):
            trainer.network.train()
            trainer.lr_scheduler.step(epoch)
        for _ in range(2):
            images, labels = patches.draw()
            loss = harness.train_step(ours, images, labels)
            theirs_loss = theirs.train_step({"data": images, "target": labels})["loss"]
            assert loss.item() == pytest.approx(float(theirs_loss), rel=1e-4 if on_device else 0)
    for name, tensor in state(ours).items():
        moved, error = ((tensor - other[name]).norm().item() for other in (before, state(theirs)))
        assert moved > 0 or not tensor.is_floating_point() or "seg_layers" in name, name  # a head may have no weight
        assert error <= (1e-2 * moved + 1e-6 if on_device else 0), name


def test_an_arm_with_a_training_step_of_its_own_is_refused(make: Make, harness: ModuleType) -> None:
    trainer = make("nnUNetTrainer")
    trainer.__class__ = type("Own", (type(trainer),), {"train_step": lambda self, batch: {}})
    with pytest.raises(TypeError, match="Own has a training step of its own"):
        harness.train_step(trainer, *make_patches(trainer).draw())


class NothingIsRead(TorchDispatchMode):
    """Fails where the host asks for a value of a tensor: while a graph is captured there is none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("arm", ["nnUNetTrainer", "barrier", "stride_2", "equal", "Paper"])
def test_a_step_reads_nothing_on_the_host(
    arm: str, make: Make, harness: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(arm)
    for optimizer in filter(None, [trainer.optimizer, getattr(trainer, "loss_optimizer", None)]):
        harness.keep_on_device(optimizer)
    images, labels = make_patches(trainer).draw()
    harness.train_step(trainer, images, labels)
    monkeypatch.setattr(ClassCriterion, "check_values", lambda *args: None)  # elsewhere it is of the first step alone
    with NothingIsRead():
        harness.train_step(trainer, images, labels)


def test_trainings_side_by_side_leave_what_nnunet_validates(make: Make, harness: ModuleType, tmp_path: Path) -> None:
    trainers = [make(arm) for arm in ("nnUNetTrainer", "barrier")]
    patches = make_patches(trainers[0])
    arms = [harness.Arm(trainer, make_patches(trainer, seed=3), patches) for trainer in trainers]
    assert harness.train(arms) > 0
    for arm, trainer in zip(arms, trainers, strict=True):
        folder = Path(trainer.output_folder)
        checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
        assert arm.steps == 8 and checkpoint["current_epoch"] == 4
        log = checkpoint["logging"]
        assert len(log["train_losses"]) == len(log["mean_fg_dice"]) == 4
        rates = [0.1 * (1 - epoch / 4) ** 0.9 for epoch in range(4)]
        assert log["lrs"] == pytest.approx(rates)
        assert all(torch.equal(checkpoint["network_weights"][n], p) for n, p in trainer.network.state_dict().items())
    assert (Path(trainers[1].output_folder) / "lomix_weights.csv").is_file()


@on_a_gpu
@pytest.mark.parametrize("arm", ["nnUNetTrainer", "barrier", "stride_2", "equal", "Paper"])
def test_a_training_of_replayed_steps_is_one_of_computed_steps(
    arm: str, make: Make, harness: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks, losses, states = [], [], []
    for captured in (True, False):
        monkeypatch.setattr(harness, "STEPS_BEFORE_CAPTURE", 3 if captured else None)
        trainer = make(arm, "cuda")
        replaying = harness.Arm(trainer, make_patches(trainer, seed=3), make_patches(trainer))
        harness.train([replaying])
        losses.append(trainer.logger.get_value("train_losses", step=None))
        states.append(replaying.training.generator.get_state())
        assert (replaying.graph is not None) == captured
        networks.append(torch.cat([p.detach().flatten() for p in trainer.network.parameters()]))
    torch.testing.assert_close(*networks, rtol=1e-2, atol=1e-2)
    # a graph that repeats a batch, or a learning rate, has other losses
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert torch.equal(*states)


def test_a_first_step_that_is_left_out_leaves_no_trace(make: Make, harness: ModuleType) -> None:
    """Fused SGD makes its momentum of whatever is in the memory, and fills it in the first step that isn't left out."""
    parameters = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    ours, theirs = (torch.optim.SGD([p], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1) for p in parameters)
    harness.keep_on_device(ours)
    for p in parameters:
        p.grad = torch.ones(5)
    ours.found_inf, ours.grad_scale = torch.ones(()), None
    ours.step()
    assert torch.equal(parameters[0], torch.ones(5))
    ours.found_inf = torch.zeros(())
    for _ in range(3):
        ours.step()
        theirs.step()
    torch.testing.assert_close(*parameters)


def test_an_arm_that_can_not_go_on_ends_alone(make: Make, harness: ModuleType, capsys: Any) -> None:
    arms = []
    for name in ("barrier", "nnUNetTrainer"):
        trainer = make(name)
        arms.append(harness.Arm(trainer, make_patches(trainer), make_patches(trainer)))
    broken, healthy = arms
    with torch.no_grad():
        next(broken.trainer.network.parameters()).fill_(torch.nan)
    harness.train(arms)
    assert arms == [healthy] and (Path(healthy.trainer.output_folder) / "checkpoint_final.pth").is_file()
    assert not (Path(broken.trainer.output_folder) / "checkpoint_final.pth").exists()
    assert "Studybarrier has ended: " in capsys.readouterr().out


def test_runs_are_trained_from_a_file(make: Make, harness: ModuleType, tmp_path: Path, capsys: Any) -> None:
    """The arms of a seed have the same first network and batches, but the one that says otherwise has other batches."""
    dataset = make("nnUNetTrainer").preprocessed_dataset_folder_base
    budget = {"seed": 3, "epochs": 1, "iterations": 1, "optimiser": "sgd"}
    runs = [
        {"arm": arm, "dataset": dataset, "fold": 0, "results": str(tmp_path / "own"), "budget": budget}
        for arm in ("nnUNetTrainer", "nnUNetTrainer_again", "nnUNetTrainer_other_batches")
    ]
    (tmp_path / "runs.json").write_text(json.dumps({"device": "cpu", "runs": runs}))
    harness.main(tmp_path / "runs.json")
    assert "Trained 3 runs, 0 of them on graphs: " in capsys.readouterr().out
    same, again, other = (
        torch.load(file, weights_only=False)["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"]
        for arm in ("nnUNetTrainer", "nnUNetTrainer_again", "nnUNetTrainer_other_batches")
        for file in tmp_path.glob(f"own/*/Study{arm}__*/fold_0/checkpoint_final.pth")
    )
    assert torch.equal(same, again) and not torch.equal(same, other)


def test_signals_are_left_to_the_process(make: Make, harness: ModuleType) -> None:
    """A training listens to them and writes a checkpoint from which it goes on; here nobody would."""
    before = signal.getsignal(signal.SIGTERM)
    trainer = make("barrier")
    harness.Arm(trainer, make_patches(trainer), make_patches(trainer))
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_mean_loss_of_an_epoch_is_logged(make: Make, harness: ModuleType) -> None:
    trainer = make("nnUNetTrainer")
    arm = harness.Arm(trainer, make_patches(trainer), make_patches(trainer))
    losses = []
    trainer.loss.register_forward_hook(lambda module, inputs, value: losses.append(value.item()))
    arm.start_epoch()
    arm.step()
    arm.step()
    arm.end_epoch()
    assert trainer.logger.get_value("train_losses", step=0) == pytest.approx(np.mean(losses[:2]), rel=1e-6)


# Batches


def test_a_batch_has_nnunets_shapes_and_depends_on_the_seed_alone(make: Make) -> None:
    trainer = make("nnUNetTrainer")
    images, labels = make_patches(trainer, 1).draw()
    theirs = next(trainer.get_dataloaders()[0])
    assert images.shape == theirs["data"].shape and images.dtype == theirs["data"].dtype
    assert [y.shape for y in labels] == [y.shape for y in theirs["target"]]
    assert set(labels[0].unique().tolist()) <= set(range(trainer.label_manager.num_segmentation_heads))
    again, other = make_patches(trainer, 1).draw()[0], make_patches(trainer, 2).draw()[0]
    assert torch.equal(images, again) and not torch.equal(images, other)


def test_a_plain_patch_is_cut_out_of_its_case(make: Make) -> None:
    """Every pixel is that of the preprocessed image, or 0 outside; the last patches are around a voxel of a class."""
    trainer = make("nnUNetTrainer")
    patches = make_patches(trainer)
    names = list(trainer.do_split()[0])
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, names)
    cases = [dataset.load_case(name) for name in names]
    slices = [(image[:, z], label[:, z]) for image, label, *_ in cases for z in range(image.shape[1])]
    rows, columns = patches.patch_size
    seen = set()
    for _ in range(10):
        numbers, centres = patches.draw_places()
        images, (labels, *_) = patches.cut(numbers, centres, torch.eye(2))
        for i, (number, centre) in enumerate(zip(numbers.tolist(), centres, strict=True)):
            seen.add(number)
            top, left = (centre - (patches.patch - 1) / 2).round().int().tolist()
            for cut, whole in zip((images[i], labels[i]), slices[number], strict=True):
                margin = [(0, 0), (rows, rows), (columns, columns)]
                padded = np.pad(np.maximum(whole, 0) if cut is labels[i] else np.array(whole), margin)
                expected = padded[:, top + rows : top + 2 * rows, left + columns : left + 2 * columns]
                np.testing.assert_allclose(cut.numpy(), expected, atol=1e-4)
            if i >= patches.at_random:
                assert labels[i].any()
    assert len(seen) > len(slices) / 3


def test_targets_of_coarse_scales_are_nnunets() -> None:
    from patches import at_scales

    labels = torch.randint(5, (3, 1, 20, 12)).float()
    scales = [[1.0, 1.0], [0.5, 0.5], [0.25, 0.5], [0.125, 0.3]]
    expected = [DownsampleSegForDSTransform(scales)(segmentation=y)["segmentation"] for y in labels]
    for j, made in enumerate(at_scales(labels, scales)):
        assert torch.equal(made, torch.stack([y[j] for y in expected]))
    assert at_scales(labels, None) is labels


@pytest.mark.parametrize("gamma", [0.7, 1.3])
@pytest.mark.parametrize("inverted", [False, True])
def test_gamma_is_nnunets(gamma: float, inverted: bool) -> None:
    from patches import change_gamma

    images = torch.randn(2, 3, 8, 9)
    theirs = GammaTransform(gamma, float(inverted), False, 1.0, 1.0)
    expected = torch.stack([theirs(image=image.clone())["image"] for image in images])
    sign = -1 if inverted else 1
    made = sign * change_gamma(sign * images, torch.full((2, 1, 1, 1), gamma))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(change_gamma(images, torch.ones(2, 1, 1, 1)), images)


def test_maps_and_factors_have_nnunets_ranges_and_probabilities(make: Make) -> None:
    patches = make_patches(make("nnUNetTrainer"))
    patches.batch_size = 20000
    maps = patches.draw_maps().double()
    scales = maps.det().abs().sqrt()
    assert scales.min() >= 0.7 and scales.max() <= 1.4
    turned = (maps[:, 0, 1].abs() > 1e-9).double().mean().item()
    assert turned == pytest.approx(0.2, abs=0.02)
    assert ((scales - 1).abs() > 1e-6).double().mean().item() == pytest.approx(0.2, abs=0.02)
    assert (maps.det() < 0).double().mean().item() == pytest.approx(0.5, abs=0.02)
    # a rotation times a scale, columns mirrored
    unit = maps / scales[:, None, None]
    torch.testing.assert_close(unit.mT @ unit, torch.eye(2).double().expand(20000, 2, 2), rtol=0, atol=1e-6)
    factors = patches.draw_factors(0.7, 1.5, 0.3, 2)
    assert (factors == 1).all(1).double().mean().item() == pytest.approx(0.7, abs=0.02)
    assert (factors[:, 0] != factors[:, 1]).double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert factors.min() >= 0.7 and factors.max() <= 1.5
    assert (factors < 1).double().mean().item() == pytest.approx(0.15, abs=0.02)
    assert (factors > 1).double().mean().item() == pytest.approx(0.15, abs=0.02)
    bounds = torch.full((20000,), 7)
    counts = torch.bincount(patches.draw_below(bounds), minlength=7) / 20000
    torch.testing.assert_close(counts, torch.full((7,), 1 / 7), rtol=0, atol=0.02)
