"""Many trainings at once on one GPU: each training step, its batch included, is a CUDA graph on a stream of its own.

    python side_by_side.py RUNS

RUNS is a JSON file that study.py writes. The trainers are the study's, and so are their networks, losses, optimisers
and schedules; all that happens once in an epoch is done by nnU-Net's own hooks, and a checkpoint is left for its
validation. What differs from a training by nnUNetv2_train: batches come from patches.py, the network isn't compiled,
and nobody looks at the loss in an epoch. Without CUDA the same steps are done one after the other, without graphs.
"""

import json
import os
import sys
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from patches import Cases, Patches
from study import PLANS, TRAINED  # lets Python find the arms, too
from torch import Tensor, autocast
from torch.optim import Optimizer

from nnunet_lomix.nnunet.results import read_dataset_json, read_json
from nnunet_lomix.trainers import nnUNetTrainerLoMix
from nnunet_lomix.trainers.resumable import ResumableTrainer

STEPS_BEFORE_CAPTURE = 3  # of the training; libraries choose their algorithms, and optimisers make their state


def make_trainer(arm: str, folder: Path, fold: int = 0, device: str = "cpu") -> nnUNetTrainer:
    """A trainer of the study, ready to train on the preprocessed dataset in ``folder``."""
    import arms  # reads the budget in NNUNET_LOMIX_STUDY

    plans = read_json(folder / f"{PLANS}.json", "configurations") | {"continue_training": False}
    trainer = getattr(arms, f"Study{arm}")(plans, TRAINED, fold, read_dataset_json(folder), torch.device(device))
    trainer.initialize()
    return trainer


def nnunet_step(trainer: nnUNetTrainer, images: Tensor, labels: Tensor | list[Tensor]) -> Tensor:
    """nnUNetTrainer.train_step of nnU-Net 2.8.1, but for its last line, which reads the loss: no graph can do that."""
    trainer.optimizer.zero_grad(set_to_none=True)
    with autocast(trainer.device.type, enabled=trainer.device.type == "cuda", cache_enabled=False):
        loss = trainer.loss(trainer.network(images), labels)
    if trainer.grad_scaler is None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.network.parameters(), 12)
        trainer.optimizer.step()
        return loss.detach()
    trainer.grad_scaler.scale(loss).backward()
    trainer.grad_scaler.unscale_(trainer.optimizer)
    torch.nn.utils.clip_grad_norm_(trainer.network.parameters(), 12)
    trainer.grad_scaler.step(trainer.optimizer)
    trainer.grad_scaler.update()
    return loss.detach()


def train_step(trainer: nnUNetTrainer, images: Tensor, labels: Tensor | list[Tensor]) -> Tensor:
    """A step of the network and, where there are some, of the loss's own parameters; gives the loss, ``()``."""
    if type(trainer).train_step not in (nnUNetTrainer.train_step, nnUNetTrainerLoMix.train_step):
        raise TypeError(f"{type(trainer).__name__} has a training step of its own, which this isn't.")
    if not isinstance(trainer, nnUNetTrainerLoMix):
        return nnunet_step(trainer, images, labels)
    scale, own = trainer.gradient_scale(), trainer.loss_optimizer
    if own is not None:
        own.zero_grad(set_to_none=True)
    loss = nnunet_step(trainer, images, labels)
    trainer.note_step(scale)
    if own is not None:
        trainer.step_loss_optimizer(own, scale)
    return loss


def keep_on_device(optimizer: Optimizer) -> None:
    """Have the whole step of an optimiser on the device, and read its learning rates there, before its first step."""
    for group in optimizer.param_groups:
        if group.get("momentum"):  # else what a first step that is left out finds in its memory
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        group |= {"fused": True, "foreach": False, "lr": torch.tensor(group["lr"], device=group["params"][0].device)}
        if "capturable" in group:
            group["capturable"] = True
    optimizer._step_supports_amp_scaling = True  # as of all that are fused: a gradient scaler needn't wait for it


class Arm:
    """A training of an arm, whose steps are captured once and replayed.

    Args:
        trainer: initialised.
        training, validation: where its batches come from.
    """

    def __init__(self, trainer: nnUNetTrainer, training: Patches, validation: Patches):
        self.trainer, self.training, self.validation = trainer, training, validation
        self.total = torch.zeros((), device=trainer.device)  # of the losses of an epoch
        self.steps = 0
        self.rates: list[Tensor] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream() if trainer.device.type == "cuda" else None
        if self.stream is not None:
            for optimizer in filter(None, [trainer.optimizer, getattr(trainer, "loss_optimizer", None)]):
                keep_on_device(optimizer)
            self.rates = [group["lr"] for group in trainer.optimizer.param_groups]
        trainer.on_train_start()
        if isinstance(trainer, ResumableTrainer):
            trainer.stop_listening()  # to signals: here nobody goes on from a checkpoint

    def start_epoch(self) -> None:
        self.trainer.on_epoch_start()
        self.trainer.on_train_epoch_start()
        for rate, group in zip(self.rates, self.trainer.optimizer.param_groups, strict=False):
            group["lr"] = rate.fill_(group["lr"])  # the schedule writes a number, which a graph doesn't see
        self.total.zero_()

    def step(self) -> None:
        """A training step; with CUDA it is only begun."""
        with torch.cuda.stream(self.stream):  # nothing without a stream
            if self.graph is not None:
                self.graph.replay()
            else:
                self.compute_step()
        self.steps += 1
        if self.stream is not None and self.steps == STEPS_BEFORE_CAPTURE:
            self.graph = self.capture()

    def compute_step(self) -> None:
        self.total += train_step(self.trainer, *self.training.draw())

    def capture(self) -> torch.cuda.CUDAGraph:
        """The step as a graph; nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        if torch.__version__ < "2.14":  # newer ones find the generators themselves, and warn
            graph.register_generator_state(self.training.generator)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=self.stream):
            self.compute_step()
        return graph

    def end_epoch(self) -> None:
        trainer = self.trainer
        trainer.on_train_epoch_end([{"loss": np.array(self.total.item() / trainer.num_iterations_per_epoch)}])
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            batches = [self.validation.draw_plain() for _ in range(trainer.num_val_iterations_per_epoch)]
            outputs = [trainer.validation_step({"data": images, "target": labels}) for images, labels in batches]
            trainer.on_validation_epoch_end(outputs)
        trainer.on_epoch_end()


def train(arms: list[Arm]) -> float:
    """Train all arms to their end, side by side; gives the seconds of their steps alone.

    An arm whose training can't go on is taken out of the list; it has no final checkpoint.
    """
    first = arms[0].trainer
    epochs, steps, seconds = first.num_epochs, first.num_iterations_per_epoch, 0.0
    for _ in range(epochs):
        for arm in arms:
            arm.start_epoch()
        start = now(first.device)
        for _ in range(steps):
            for arm in arms:
                arm.step()
        seconds += now(first.device) - start
        for arm in list(arms):
            try:
                arm.end_epoch()
            except SystemExit as end:  # of our trainers, with a sentence
                print(f"{type(arm.trainer).__name__} has ended: {end}")
                arms.remove(arm)
    for arm in arms:
        arm.trainer.on_train_end()
    return seconds


def now(device: torch.device) -> float:
    """Seconds of a clock, once the device has done what it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def main(file: Path) -> None:
    job = read_json(file, "runs")
    cases: dict[tuple[str, int], tuple[Cases, Cases]] = {}
    arms = []
    for run in job["runs"]:
        os.environ |= {"nnUNet_results": run["results"], "NNUNET_LOMIX_STUDY": json.dumps(run["budget"])}
        trainer = make_trainer(run["arm"], Path(run["dataset"]), run["fold"], job["device"])
        key = run["dataset"], run["fold"]
        if key not in cases:
            train_cases, val_cases = (Cases.load(trainer, list(names)) for names in trainer.do_split())
            cases[key] = train_cases, val_cases
        seed = run["budget"]["seed"] + 500 * trainer.other_batches
        arms.append(Arm(trainer, *(Patches(c, trainer, seed) for c in cases[key])))
    seconds = train(arms)
    steps = sum(arm.steps for arm in arms)
    captured = sum(arm.graph is not None for arm in arms)
    print(f"Trained {len(arms)} runs, {captured} of them on graphs: {steps / seconds:.1f} steps a second")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
