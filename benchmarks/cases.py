"""What is measured: every case of every benchmark, and which of them are measured on which device."""

from dataclasses import dataclass
from itertools import product
from math import prod
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

    def values(self, maps: int) -> int:
        """How many numbers so many maps have together."""
        return maps * self.batch * self.classes * prod(self.size)


NNUNET = "nnU-Net"  # its own loss stands beside the backends of LoMix

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
    # about as many values as the default computes by the backend plain on a CPU
    "3d-14-smallest": Case(2, 14, (22, 22, 22), 5, 5),
    # to try a benchmark
    "tiny": Case(2, 3, (8, 8), 2, 2),
    # cost against the number of mixed scales
    **{f"growth-{k}": Case(2, 4, (128, 128), 7, k) for k in range(2, 8)},
}

GPU = ["3d-14-all", "3d-14", "3d-3", "3d-3-regions", "2d-4", "2d-9-small", "hippocampus-2d"]
GROWTH = [name for name in CASES if name.startswith("growth")]
DEFAULT_CASES = {  # by benchmark and device
    "loss": {
        "cpu": ["3d-14-small", "2d-9", "3d-3-regions-small", "hippocampus-3d", "hippocampus-2d"],
        "cuda": GPU,
    },
    "memory": {"cpu": ["3d-14-all", "3d-14-smallest"], "cuda": GPU},
    "growth": {"cpu": GROWTH, "cuda": GROWTH},
    "step": {"cpu": ["hippocampus-2d", "hippocampus-3d"], "cuda": GPU},
    "gpu": {"cpu": ["tiny"], "cuda": GPU},
}

# beyond this number of values of all maps the backend plain, which keeps every map, needs more than about 10 GB
MOST_VALUES_OF_PLAIN = 2**29

# the kernels are compiled for outputs of so many scales and classes, for GPUs of this compute capability
KERNEL_CASES = [(5, 14), (4, 14), (5, 3), (7, 4), (5, 64)]
GPUS = {"A100": 80, "RTX 3090": 86, "H100": 90}

# of the benchmark ``gpu``; those that take longest to compile come first
GPU_PARTS = ["step", "epochs", "tests", "kernels", "loss", "correctness"]


class Card(NamedTuple):
    """The limits of a GPU, of its SXM module.

    Attributes:
        kind: its name in ``GPUS``, for which the kernels are compiled.
        clock: Hz, the highest.
        bandwidth: bytes a second of its memory.
    """

    kind: str
    clock: float
    bandwidth: float


CARDS = {  # by a part of the name that torch gives
    "H200": Card("H100", 1.98e9, 4.8e12),
    "H100": Card("H100", 1.98e9, 3.35e12),
    "A100": Card("A100", 1.41e9, 2.04e12),
}


class Check(NamedTuple):
    """The fused backend is compared with lean on a small example of this kind."""

    scales: int
    classes: int
    dimensions: int
    regions: bool
    ignore: bool

    def __str__(self) -> str:
        kind = ("regions" if self.regions else "classes") + (" and an ignore label" if self.ignore else "")
        return f"S = {self.scales}, C = {self.classes}, {kind}, {self.dimensions}D"


# each number of scales with each number of classes; the kinds take turns, each time with other classes
# (dimensions, regions, ignore)
KINDS = list(product((2, 3), (False, True), (False, True)))
CHECKS = [
    Check(scales, classes, *KINDS[(5 * i + j) % len(KINDS)])
    for i, scales in enumerate(range(3, 8))
    for j, classes in enumerate((3, 9, 14, 17))
]
# value and gradients are compared with float64 for one case of middle size each: of classes, of regions, and in 2D
ERROR_CASES = {"cpu": ["tiny"], "cuda": ["3d-14-small", "3d-3-regions-small", "2d-9-small"]}

# `nnunet_lomix compare` is measured on so many cases
NUMBERS_OF_CASES = [20, 200]
