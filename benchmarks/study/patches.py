"""nnU-Net's 2D training batches, drawn and augmented on the device: nothing waits for the host, so a graph can hold it.

The same as nnU-Net's data loader and transforms draw (2.8.1), for a whole batch at a time: a case, a slice and a place,
for the last third of a batch around a voxel of a class; rotation, scaling, noise, brightness, contrast, gamma and
mirroring, with nnU-Net's probabilities and ranges. Blur and simulated low resolution are left out. Labels are those of
the nearest pixel. Plain classes only.
"""

from typing import NamedTuple

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence


class Cases(NamedTuple):
    """The slices of N cases on a device, padded to one size, and where their classes are.

    Attributes:
        images: ``(slices, channels, H, W)``.
        labels: ``(slices, 1, H, W)``, float32.
        first: number of the first slice of each case, ``(N,)``.
        shape: slices, rows and columns of each case, ``(N, 3)``.
        voxels: slice, row and column of voxels of each class of each case, in rows of one length, ``(rows, most, 3)``.
        counts: how many voxels of a row are some, ``(rows,)``.
        first_row, rows: the rows of each case, one for each class that it has, ``(N,)``.
    """

    images: Tensor
    labels: Tensor
    first: Tensor
    shape: Tensor
    voxels: Tensor
    counts: Tensor
    first_row: Tensor
    rows: Tensor

    @classmethod
    def load(cls, trainer: nnUNetTrainer, names: list[str]) -> "Cases":
        """Preprocessed cases of the trainer's dataset, on its device.

        Raises:
            ValueError: it has regions or an ignore label.
        """
        if trainer.label_manager.has_regions or trainer.label_manager.has_ignore_label:
            raise ValueError("only plain classes can be drawn on the device")
        dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, names)
        images, labels, shapes, voxels, rows = [], [], [], [], []
        for name in names:
            image, label, _, properties = dataset.load_case(name)
            shapes.append(image.shape[1:])
            images += torch.from_numpy(np.array(image, dtype=np.float32)).unbind(1)
            labels += torch.from_numpy(np.array(label, dtype=np.float32)).clamp_min(0).unbind(1)  # -1: outside
            present = [torch.from_numpy(np.array(v[:, 1:])) for v in properties["class_locations"].values() if len(v)]
            voxels += present
            rows.append(len(present))
        device = trainer.device
        depths, counts = torch.tensor([s[0] for s in shapes]), torch.tensor([len(v) for v in voxels])
        return cls(
            pad_to_one_size(images).to(device),
            pad_to_one_size(labels).to(device),
            (depths.cumsum(0) - depths).to(device),
            torch.tensor(shapes).to(device),
            pad_sequence(voxels, batch_first=True).to(device),
            counts.to(device),
            (torch.tensor(rows).cumsum(0) - torch.tensor(rows)).to(device),
            torch.tensor(rows).to(device),
        )


def pad_to_one_size(slices: list[Tensor]) -> Tensor:
    height, width = (max(s.shape[axis] for s in slices) for axis in (1, 2))
    return torch.stack([F.pad(s, (0, width - s.shape[2], 0, height - s.shape[1])) for s in slices])


class Patches:
    """Batches for a trainer; those of one seed are the same for all trainers of one configuration.

    Args:
        cases: what is drawn from.
        trainer: tells the size of a batch and of a patch, the scales of the targets and the range of rotations.
        seed: of the random numbers, which are the patches' own.

    Attributes:
        generator: of the random numbers.
    """

    def __init__(self, cases: Cases, trainer: nnUNetTrainer, seed: int):
        device = trainer.device
        self.cases = cases
        self.batch_size = trainer.batch_size
        self.at_random = round(self.batch_size * (1 - trainer.oversample_foreground_percent))
        self.patch_size = tuple(trainer.configuration_manager.patch_size)
        self.scales = trainer._get_deep_supervision_scales()
        (_, self.largest_angle), *_ = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        # constants of the device, since a graph can't hold a copy from the host
        self.patch = torch.tensor(self.patch_size, device=device)
        self.plane = torch.tensor(cases.images.shape[2:], device=device)
        self.around_a_voxel = torch.arange(self.batch_size, device=device) >= self.at_random
        rows, columns = (torch.arange(n, device=device) - (n - 1) / 2 for n in self.patch_size)
        self.offsets = torch.cartesian_prod(rows, columns)  # of the pixels of a patch from its centre
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor | list[Tensor]]:
        """An augmented batch: images ``(B, channels, *patch)``, and labels as :meth:`cut` gives them."""
        images, labels = self.cut(*self.draw_places(), self.draw_maps())
        return self.change_intensities(images), labels

    def draw_plain(self) -> tuple[Tensor, Tensor | list[Tensor]]:
        """A batch as it is, as for nnU-Net's validation in training."""
        return self.cut(*self.draw_places(), torch.eye(2, device=self.patch.device))

    def cut(self, slices: Tensor, centres: Tensor, maps: Tensor) -> tuple[Tensor, Tensor | list[Tensor]]:
        """Patches of slices: images, and labels ``(B, 1, *patch)``, or a list of those of all scales."""
        positions = centres[:, None] + self.offsets @ maps.mT
        grid = ((2 * positions + 1) / self.plane - 1).flip(-1).unflatten(1, self.patch_size)
        images = F.grid_sample(self.cases.images[slices], grid, mode="bilinear", align_corners=False)
        labels = F.grid_sample(self.cases.labels[slices], grid, mode="nearest", align_corners=False)
        return images, at_scales(labels, self.scales)

    def draw_places(self) -> tuple[Tensor, Tensor]:
        """A slice ``(B,)`` for each patch, and the row and column of its centre, ``(B, 2)``."""
        cases = self.cases
        case = self.draw_below(torch.full_like(self.around_a_voxel, len(cases.first), dtype=torch.int64))
        depth, plane = cases.shape[case, 0], cases.shape[case, 1:]
        # the first pixel of a patch: anywhere inside, or outside by half of what a small slice lacks
        lowest = -((self.patch - plane).clamp_min(0) // 2)
        z, corner = self.draw_below(depth), lowest + self.draw_below((plane - self.patch).clamp_min(0) + 1)
        row = cases.first_row[case] + self.draw_below(cases.rows[case].clamp_min(1))
        row = row.clamp_max(len(cases.counts) - 1)
        voxel = cases.voxels[row, self.draw_below(cases.counts[row])]
        around = self.around_a_voxel & (cases.rows[case] > 0)
        z = torch.where(around, voxel[:, 0], z)
        corner = torch.where(around[:, None], torch.maximum(lowest, voxel[:, 1:] - self.patch // 2), corner)
        return cases.first[case] + z, corner + (self.patch - 1) / 2

    def draw_maps(self) -> Tensor:
        """From an offset in a patch to one in its slice: rotation, scaling and mirroring, ``(B, 2, 2)``."""
        angle = self.draw_between(-self.largest_angle, self.largest_angle) * self.with_probability(0.2)
        scale = torch.where(self.with_probability(0.2), self.draw_between(0.7, 1.4), 1.0)
        mirrored = torch.where(self.draw_uniform(2) < 0.5, -1.0, 1.0)
        cos, sin = angle.cos() * scale, angle.sin() * scale
        turned = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
        return turned * mirrored[:, None]

    def change_intensities(self, images: Tensor) -> Tensor:
        """Noise, brightness, contrast and gamma."""
        channels = images.shape[1]
        noise = torch.randn(images.shape, generator=self.generator, device=images.device)
        images = images + noise * as_image((self.draw_between(0, 0.1) * self.with_probability(0.1))[:, None])
        images = images * as_image(self.draw_factors(0.75, 1.25, 0.15, channels))
        mean, (low, high) = images.mean((2, 3), keepdim=True), extremes(images)
        contrast = as_image(self.draw_factors(0.75, 1.25, 0.15, channels))
        images = ((images - mean) * contrast + mean).clamp(low, high)
        images = -change_gamma(-images, as_image(self.draw_factors(0.7, 1.5, 0.1, channels)))
        return change_gamma(images, as_image(self.draw_factors(0.7, 1.5, 0.3, channels)))

    def draw_uniform(self, *size: int) -> Tensor:
        """Numbers from 0 to 1, ``(B, *size)``."""
        return torch.rand(self.batch_size, *size, generator=self.generator, device=self.patch.device)

    def draw_between(self, low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * self.draw_uniform(*size)

    def draw_below(self, bounds: Tensor) -> Tensor:
        """Whole numbers from 0 to bounds - 1, of the shape of ``bounds``, ``(B, …)``."""
        return torch.minimum((self.draw_uniform(*bounds.shape[1:]) * bounds).long(), bounds - 1)

    def with_probability(self, p: float) -> Tensor:
        return self.draw_uniform() < p

    def draw_factors(self, low: float, high: float, p: float, channels: int) -> Tensor:
        """With probability p factors, half of them below 1 and half of them above; else 1; ``(B, channels)``."""
        below = self.draw_uniform(channels) < 0.5
        factors = torch.where(below, self.draw_between(low, 1, channels), self.draw_between(1, high, channels))
        return torch.where(self.with_probability(p)[:, None], factors, 1.0)


def as_image(numbers: Tensor) -> Tensor:
    return numbers[..., None, None]


def extremes(images: Tensor) -> tuple[Tensor, Tensor]:
    return images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)


def change_gamma(images: Tensor, gamma: Tensor) -> Tensor:
    """nnU-Net's GammaTransform, which keeps mean and standard deviation; where gamma is 1, the images as they are."""
    low, high = extremes(images)
    changed = ((images - low) / (high - low).clamp_min(1e-7)) ** gamma * (high - low) + low
    changed = changed - changed.mean((2, 3), keepdim=True)
    spread, old_spread = (x.std((2, 3), keepdim=True) for x in (changed, images))
    changed = changed * (old_spread / spread.clamp_min(1e-7)) + images.mean((2, 3), keepdim=True)
    return torch.where(gamma == 1, images, changed)


def at_scales(labels: Tensor, scales: list | None) -> Tensor | list[Tensor]:
    """What nnU-Net's DownsampleSegForDSTransform makes of labels ``(B, 1, *spatial)``; without scales themselves."""
    if scales is None:
        return labels
    sizes = [[round(n * s) for n, s in zip(labels.shape[2:], scale, strict=True)] for scale in scales]
    return [labels if n == list(labels.shape[2:]) else F.interpolate(labels, n, mode="nearest-exact") for n in sizes]
