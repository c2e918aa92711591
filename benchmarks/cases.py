"""What is measured: every case of every benchmark, and which of them are measured on which device."""

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple


@dataclass(frozen=True)
class Case:
    """A batch and the outputs of a network on it.

    Attributes:
        batch: number of samples.
        classes: number of channels of each output.
        size: voxels of a patch along each axis; each scale has half of the one before.
        scales: number of outputs.
        mixed_scales: how many of the finest scales are mixed.
        regions: whether the channels are overlapping regions (sigmoid) rather than classes (softmax).
    """

    batch: int
    classes: int
    size: tuple[int, ...]
    scales: int
    mixed_scales: int
    regions: bool = False

    def __str__(self) -> str:
        channels = f"{self.classes} regions" if self.regions else f"{self.classes}"
        shape = f"({self.batch}, {channels}, {' × '.join(map(str, self.size))})"
        return f"{shape}, S = {self.scales}, K = {self.mixed_scales}"


NNUNET = "nnU-Net"  # its own loss stands beside the backends of LoMix
STRIDE = 2  # of the grid on which the default trainer supervises maps; where it isn't said, it is meant

CASES = {
    # nnU-Net's usual patches; K is 4 by default
    "3d-14-all": Case(2, 14, (128, 128, 128), 5, 5),
    "3d-14": Case(2, 14, (128, 128, 128), 5, 4),
    "3d-3": Case(2, 3, (128, 128, 128), 5, 4),
    "3d-3-regions": Case(2, 3, (128, 128, 128), 5, 4, regions=True),
    "2d-4": Case(12, 4, (512, 512), 7, 4),
    # smaller ones, that a CPU computes in seconds
    "3d-14-small": Case(2, 14, (48, 48, 48), 5, 5),
    "3d-3-regions-small": Case(2, 3, (48, 48, 48), 5, 5, regions=True),
    "2d-9": Case(8, 9, (256, 256), 4, 4),
    "2d-9-small": Case(12, 9, (128, 128), 5, 4),
    # MSD Hippocampus, with a batch of 16 in 2D instead of 366
    "hippocampus-3d": Case(2, 3, (40, 56, 40), 3, 3),
    "hippocampus-2d": Case(16, 3, (56, 40), 3, 3),
    # the largest of its kind that the backend plain computes at once
    "3d-14-at-once": Case(2, 14, (56, 56, 56), 5, 5),
    # to try a benchmark
    "tiny": Case(2, 3, (8, 8), 2, 2),
}

GPU = ["3d-14-all", "3d-14", "3d-3", "3d-3-regions", "2d-4", "2d-9-small", "hippocampus-2d"]
DEFAULT_CASES = {  # by benchmark and device
    "loss": {
        "cpu": ["3d-14-small", "2d-9", "3d-3-regions-small", "hippocampus-3d", "hippocampus-2d"],
        "cuda": GPU,
    },
    "memory": {"cpu": ["3d-14-all", "3d-14-at-once"], "cuda": GPU},
    "step": {"cpu": ["hippocampus-2d", "hippocampus-3d"], "cuda": GPU},
    "gpu": {"cpu": ["tiny"], "cuda": GPU},
}

# the kernels are compiled for so many mixed scales and classes, for GPUs of this compute capability
KERNEL_CASES = [(4, 14), (5, 14), (4, 3), (7, 4), (4, 32), (4, 64)]
GPUS = {"A100": 80, "RTX 3090": 86, "H100": 90}

# of the benchmark ``gpu``; those that take longest to compile come first
GPU_PARTS = ["step", "epochs", "tests", "kernels", "loss", "correctness"]


class Check(NamedTuple):
    """The fused backend is compared with plain on a small example of this kind; the coarsest scale isn't mixed."""

    scales: int
    classes: int
    regions: bool
    ignore: bool

    def __str__(self) -> str:
        kind = ("regions" if self.regions else "classes") + (" and an ignore label" if self.ignore else "")
        return f"S = {self.scales}, C = {self.classes}, {kind}"


# each number of scales with each number of classes; the kinds (regions, ignore) take turns
KINDS = list(product((False, True), (False, True)))
CHECKS = [
    Check(scales, classes, *KINDS[(i + j) % len(KINDS)])
    for i, scales in enumerate(range(3, 9))
    for j, classes in enumerate((3, 9, 14, 17))
]
# value and gradients are compared with float64 for one case of middle size each: of classes, of regions, and in 2D
ERROR_CASES = {"cpu": ["tiny"], "cuda": ["3d-14-small", "3d-3-regions-small", "2d-9-small"]}
