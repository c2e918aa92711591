"""The trainers of the study's extensions, as tests/trainers/test_trainers.py has it for those of the package."""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nnunet_lomix.trainers import lomix

from ...trainers.conftest import LoMixTiny, Tiny, assert_same, batch, make, train_steps  # noqa: F401

pytestmark = pytest.mark.end_to_end
Make = Callable[..., nnUNetTrainer]


def tiny(trainer: str, **attributes: object) -> type[nnUNetTrainer]:
    """A trainer of the extensions, by its name, with a tiny training."""
    import extensions

    return type("ExtensionTiny", (Tiny, getattr(extensions, trainer)), attributes)


def test_a_resumed_training_by_alignment_equals_an_uninterrupted_one_bit_for_bit(
    make: Make,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    extensions: ModuleType,
) -> None:
    monkeypatch.setattr(extensions.Alignment, "alignment_every", 3)  # once before and once after the interruption
    cls = tiny("nnUNetTrainerLoMixAlignment", rule="alignment_held_out")
    whole = make(cls)
    whole.run_training()

    class Interrupted(cls):
        def on_epoch_end(self) -> None:
            super().on_epoch_end()
            if self.current_epoch == 2:
                self.current_epoch -= 1  # as nnU-Net saves it, at the end of an epoch
                self.save_checkpoint(os.path.join(self.output_folder, "checkpoint_latest.pth"))
                raise KeyboardInterrupt

    first = make(Interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.run_training()
    second = make(cls)
    second.load_checkpoint(os.path.join(first.output_folder, "checkpoint_latest.pth"))
    assert second.current_epoch == 2
    second.run_training()

    for part in ("network", "loss", "optimizer", "loss_optimizer"):
        assert_same(getattr(whole, part).state_dict(), getattr(second, part).state_dict())
    assert_same(*(t.logger.get_value(lomix.HISTORY, None) for t in (whole, second)))
    assert len(second.logger.get_value(lomix.HISTORY, None)) == 4


def test_the_rule_sees_the_alignment_at_every_tenth_step(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    trainer = make(tiny("nnUNetTrainerLoMixAlignment"))
    rule, seen = trainer.loss.rule, []
    align = rule.align
    monkeypatch.setattr(rule, "align", lambda alignment: seen.append(rule.steps) or align(alignment))
    before = {name: p.clone() for name, p in trainer.network.named_parameters()}
    rule.align(trainer._measure(batch(trainer, 0)))
    assert_same(before, dict(trainer.network.named_parameters()))
    assert len(trainer.loss.weights().unique()) > 2
    seen.clear()
    train_steps(trainer, 12)
    assert seen == [0, 10]


def test_the_rule_sees_the_progress_of_the_training(make: Make) -> None:  # noqa: F811
    trainer = make(tiny("nnUNetTrainerLoMixFading", rule="fade_out"))
    seen = []
    for epoch in range(trainer.num_epochs):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        seen.append(trainer.loss.weights()[0].item())
    assert trainer.loss.rule.progress == 3 / 4
    start = seen[0]
    assert 0.5 < start < 1
    assert seen == pytest.approx([start + t / 4 * (1 - start) for t in range(4)])


def test_the_best_map_may_teach(make: Make, extensions: ModuleType) -> None:  # noqa: F811
    taught, alone = make(tiny("nnUNetTrainerLoMixDistillation", distillation=2.0)), make(LoMixTiny)
    assert isinstance(taught.loss, extensions.DistillingLoMixLoss) and taught.loss.distillation == 2
    train_steps(taught, 2)
    train_steps(alone, 2)
    weights = [t.network.decoder.seg_layers[-1].weight for t in (taught, alone)]
    assert not torch.equal(*weights)


def test_a_teacher_among_a_sample_of_the_maps_is_refused(make: Make) -> None:  # noqa: F811
    with pytest.raises(SystemExit, match="^ExtensionTiny: the teacher is chosen among all maps; leave out"):
        make(tiny("nnUNetTrainerLoMixDistillation", sampled_mutants=4))


def one_aligned_rank(
    rank: int, world_size: int, store: Path, plans: dict, dataset_json: dict, variables: dict[str, str], result: Path
) -> None:
    """A training step of a rank on its half of the batch, as nnU-Net trains on several GPUs, but on the CPU."""
    import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as host

    os.environ.update(variables)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    host.DDP = lambda network, device_ids: DistributedDataParallel(network)  # no GPU here
    torch.manual_seed(0)
    trainer = tiny("nnUNetTrainerLoMixAlignment")(plans, "2d", 0, dataset_json, torch.device("cpu"))
    trainer.device, trainer.grad_scaler = torch.device("cpu"), None
    trainer.initialize()
    train_steps(trainer, samples=slice(2 * rank, 2 * rank + 2))
    parameters = dict([*trainer.network.named_parameters(), *trainer.loss.named_parameters()])
    torch.save({"parameters": parameters, "weights": trainer.loss.weights()}, f"{result}.{rank}")
    dist.destroy_process_group()


def test_two_ranks_share_what_they_saw_of_the_alignment(
    make: Make,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each rank looks ahead on its own part of the batch."""
    # the processes import this module to find one_aligned_rank
    monkeypatch.syspath_prepend(Path(__file__).parents[3])
    alone = make(tiny("nnUNetTrainerLoMixAlignment"), initialize=False)
    plans = alone.plans_manager.plans | {"continue_training": False}
    plans["configurations"]["2d"] |= {"batch_dice": False}
    variables = {k: os.environ[k] for k in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    arguments = (2, tmp_path / "store", plans, alone.dataset_json, variables, tmp_path / "result")
    torch.multiprocessing.spawn(one_aligned_rank, arguments, nprocs=2, join=True)
    results = [torch.load(tmp_path / f"result.{rank}") for rank in (0, 1)]
    assert_same(*results)
    assert len(results[0]["weights"].unique()) > 2
