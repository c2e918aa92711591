"""Time of a whole training step: nnUNetTrainerLoMix beside nnUNetTrainer, and on CUDA the peak of memory.

The trainers themselves make their steps, on random images, with the network that nnU-Net's planner configures. Both
train the same network in turns.
"""

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from cases import NNUNET, Case
from examples import backend_and_stride, count_maps, default_backend, losses_for, make_targets
from measuring import in_its_own_process, milliseconds, now, spread, take_turns
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from results import Rows

from nnunet_lomix.trainers import nnUNetTrainerLoMix

REPEATS = 11
DEFAULT = "default"  # nnUNetTrainerLoMix as it is: it chooses the backend
DATASET, CONFIGURATION = "Dataset000_Random", "random"


def measure(cases: Sequence[Case], device: str, repeats: int, wanted: Sequence[str] = ()) -> Rows:
    """A row for nnU-Net, for LoMix as its trainer is, and for each wanted loss.

    Times are milliseconds; the ratio is that to nnU-Net's step of the same
    turn; memory is the peak of what PyTorch has allocated, in megabytes, None on a CPU.
    """
    threads = torch.get_num_threads()
    # a compiler that knows no other network, and memory that nobody else has used
    by_case = [in_its_own_process(measure_case, case, device, repeats, wanted, threads) for case in cases]
    return [row for rows in by_case for row in rows]


def measure_case(case: Case, device: str, repeats: int, wanted: Sequence[str], threads: int) -> Rows:
    """The rows of a case."""
    torch.set_num_threads(threads)
    named = losses_for(case, device, wanted) if wanted else []
    names = [NNUNET, DEFAULT, *(name for name in named if name != NNUNET)]
    with nnunet_folders(), redirect_stdout(StringIO()):  # a trainer tells more than is wanted here
        trainers = {name: make_trainer(name, case, device) for name in names}
        for trainer in trainers.values():
            trainer.network, trainer.optimizer = trainers[NNUNET].network, trainers[NNUNET].optimizer
        trainers[NNUNET].network.train()
        batch = make_batch(case, device)
        steps = {name: Step(trainer, batch, device) for name, trainer in trainers.items()}
        seconds = {name: times[:, 0] for name, times in take_turns(steps, repeats, warm_up=2).items()}
    rows = []
    for name in names:
        rows.append(
            {
                "case": str(case),
                "backend": name,
                "computed_by": default_backend(case, device) if name == DEFAULT else name,
                "maps": count_maps(name, case),
                "step_ms": milliseconds(seconds[name]),
                "ratio": spread(seconds[name] / seconds[NNUNET]),
                "memory_mb": steps[name].megabytes,
            }
        )
    return rows


class Step:
    """A training step of a trainer, on the same batch each time.

    Attributes:
        megabytes: the peak of the last step; None on a CPU.
    """

    def __init__(self, trainer: nnUNetTrainer, batch: dict, device: str):
        self.trainer = trainer
        self.batch = batch
        self.device = device
        self.megabytes: int | None = None

    def __call__(self) -> tuple[float]:
        """Its seconds."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = now(self.device)
        self.trainer.train_step(self.batch)
        seconds = now(self.device) - start
        if self.device == "cuda":
            self.megabytes = torch.cuda.max_memory_allocated() // 2**20
        return (seconds,)


@contextmanager
def nnunet_folders() -> Iterator[None]:
    """nnU-Net's folders, empty, for as long as the block lasts."""
    before = dict(os.environ)
    logger = logging.getLogger("nnunet_lomix")
    handlers = list(logger.handlers)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"nnUNet_preprocessed": folder, "nnUNet_results": folder}
        # by the ending of the files there nnU-Net decides how it would read them
        cases = Path(folder, DATASET, CONFIGURATION)
        cases.mkdir(parents=True)
        (cases / "case.b2nd").touch()
        try:
            yield
        finally:
            for name in ("nnUNet_preprocessed", "nnUNet_results"):
                os.environ.pop(name)
            os.environ |= before
            logger.handlers = handlers  # the log of a trainer is gone with its folder


def make_trainer(name: str, case: Case, device: str) -> nnUNetTrainer:
    """nnU-Net's trainer, LoMix's as it is, or LoMix's by a backend and stride; ready for its first step."""
    trainer_class = nnUNetTrainer
    if name != NNUNET:
        attributes = {"mixed_scales": case.mixed_scales}
        if name != DEFAULT:
            attributes["backend"], attributes["stride"] = backend_and_stride(name)
        trainer_class = type("LoMix", (nnUNetTrainerLoMix,), attributes)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = device == "cuda"  # as nnUNetv2_train
    trainer = trainer_class(make_plans(case), CONFIGURATION, 0, make_dataset_json(case), torch.device(device))
    trainer.initialize()
    return trainer


def make_plans(case: Case) -> dict:
    """What nnU-Net's planner decides: a PlainConvUNet of one stage more than outputs, each with half of the voxels."""
    dim, stages = len(case.size), case.scales + 1
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": [min(512 if dim == 2 else 320, 32 * 2**i) for i in range(stages)],
            "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
            "kernel_sizes": [[3] * dim] * stages,
            "strides": [[1] * dim] + [[2] * dim] * (stages - 1),
            "n_conv_per_stage": [2] * stages,
            "n_conv_per_stage_decoder": [2] * (stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration = {
        "data_identifier": CONFIGURATION,
        "batch_size": case.batch,
        "patch_size": list(case.size),
        "batch_dice": dim == 2,
        "architecture": architecture,
    }
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "configurations": {CONFIGURATION: configuration},
        "continue_training": False,  # nnUNetv2_train passes it on with the plans
    }


def make_dataset_json(case: Case) -> dict:
    """One channel, and the labels of a case; region i is made of the labels from i on, so each lies within the last."""
    labels: dict[str, int | list[int]] = {"background": 0}
    numbers = range(1, case.classes + case.regions)
    for i in numbers:
        labels[f"label {i}"] = list(range(i, numbers.stop)) if case.regions else i
    regions = {"regions_class_order": list(numbers)} if case.regions else {}
    return {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"} | regions


def make_batch(case: Case, device: str) -> dict:
    """A batch as nnU-Net's data loader gives it, but on the device already."""
    torch.manual_seed(0)
    data = torch.randn(case.batch, 1, *case.size, device=device)
    return {"data": data, "target": make_targets(case, device)}
