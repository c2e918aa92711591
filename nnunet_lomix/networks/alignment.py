"""Images of any size in a network whose sides must be divisible by 32, and outputs that fit the image.

The image is padded on the right and at the bottom, so pixel 0 stays where it is. An output has a whole pixel for each
``stride`` pixels of the image, without a rest: then a target that is resampled to its size lies exactly under it.
"""

from collections.abc import Sequence
from math import gcd

from torch import Tensor
from torch.nn import functional as F

HEAD_STRIDES = (4, 8, 16, 32)  # of what the heads give, finest first


def output_strides(size: Sequence[int]) -> list[list[int]]:
    """How many pixels of the image one of each output is as long as, by axis; finest first.

    Args:
        size: of the image, without batch and channels.

    The finest output has full resolution. Each other one has the stride of its head, or along an axis that this doesn't
    divide the largest power of two that does:

    >>> output_strides((224, 56))
    [[1, 1], [8, 8], [16, 8], [32, 8]]
    """
    return [[1] * len(size), *([gcd(length, stride) for length in size] for stride in HEAD_STRIDES[1:])]


def pad(image: Tensor) -> Tensor:
    """An image, ``(B, C, H, W)``, with zeros on the right and at the bottom up to multiples of the coarsest stride."""
    height, width = image.shape[2:]
    return F.pad(image, (0, -width % HEAD_STRIDES[-1], 0, -height % HEAD_STRIDES[-1]))


def align(logits: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
    """What the heads give of a padded image, as outputs that fit the image: enlarged bilinearly, and cropped.

    Args:
        logits: of the finest head alone, or of all, finest first; each ``(B, classes, H, W)`` of the padded image
            divided by its stride.
        size: ``(H, W)`` of the image before it was padded.

    Returns:
        As many outputs, each of the size of the image divided by its :func:`output_strides`.
    """
    return [
        _fit(z, [head_stride // stride for stride in strides], [n // s for n, s in zip(size, strides, strict=True)])
        for z, head_stride, strides in zip(logits, HEAD_STRIDES, output_strides(size), strict=False)
    ]


def _fit(z: Tensor, factors: Sequence[int], size: Sequence[int]) -> Tensor:
    if max(factors) > 1:
        enlarged = [length * factor for length, factor in zip(z.shape[2:], factors, strict=True)]
        z = F.interpolate(z, enlarged, mode="bilinear")
    return z[..., : size[0], : size[1]]
