"""EMCAD: efficient multi-scale convolutional attention decoding (Rahman et al., CVPR 2024), and the paper's network.

The decoder is written from the paper, arXiv 2405.06880, section 3.1. Where it leaves something open, this is what gives
the number of parameters of the authors' decoder, 1 913 515 for PVT-V2-B2: convolutions before a normalisation have no
bias but in the gates, attention over channels has a sixteenth of them inside, and one attention over pixels serves all
scales.
"""

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_lomix.networks.alignment import align, pad
from nnunet_lomix.networks.pvt import CHANNELS, PVTEncoder


def convolution(inputs: int, outputs: int, kernel: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=bias)


class ChannelAttention(nn.Module):
    """CAB: each channel times a number between 0 and 1, by the mean and the maximum of all channels."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        inner = channels // reduction
        self.weigh = nn.Sequential(convolution(channels, inner), nn.ReLU(), convolution(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` to the same."""
        mean, maximum = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return x * torch.sigmoid(self.weigh(mean) + self.weigh(maximum))


class SpatialAttention(nn.Module):
    """SAB: each pixel times a number between 0 and 1, by mean and maximum over the channels around it."""

    def __init__(self, kernel: int = 7):
        super().__init__()
        self.weigh = convolution(2, 1, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` to the same, for any number of channels."""
        statistics = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.weigh(statistics))


class MultiScaleConvolution(nn.Module):
    """MSCB: an inverted residual block whose depth-wise convolution is the sum of several, of different kernels."""

    def __init__(self, channels: int, kernels: Sequence[int] = (1, 3, 5), expansion: int = 2):
        super().__init__()
        inner = expansion * channels
        self.expand = nn.Sequential(convolution(channels, inner), nn.BatchNorm2d(inner), nn.ReLU6())
        self.depthwise = nn.ModuleList(
            nn.Sequential(convolution(inner, inner, kernel, groups=inner), nn.BatchNorm2d(inner), nn.ReLU6())
            for kernel in kernels
        )
        self.project = nn.Sequential(
            nn.ChannelShuffle(channels), convolution(inner, channels), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` to the same."""
        expanded = self.expand(x)
        return x + self.project(reduce(torch.add, (branch(expanded) for branch in self.depthwise)))


class UpConvolution(nn.Module):
    """EUCB: twice the size by a depth-wise convolution, and another number of channels by a point-wise one."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.depthwise = nn.Sequential(convolution(inputs, inputs, 3, groups=inputs), nn.BatchNorm2d(inputs), nn.ReLU())
        self.pointwise = convolution(inputs, outputs, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` to ``(B, outputs, 2 H, 2 W)``."""
        return self.pointwise(self.depthwise(F.interpolate(x, scale_factor=2, mode="nearest")))


class AttentionGate(nn.Module):
    """LGAG: each pixel of a skip connection times a number between 0 and 1, by large-kernel grouped convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        inner = channels // 2
        self.of_decoder, self.of_skip = (
            nn.Sequential(convolution(channels, inner, 3, groups=inner, bias=True), nn.BatchNorm2d(inner))
            for _ in range(2)
        )
        self.weigh = nn.Sequential(convolution(inner, 1, bias=True), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """The skip connection, weighed by itself and the decoder's features x; all ``(B, channels, H, W)``."""
        return skip * self.weigh(F.relu(self.of_decoder(x) + self.of_skip(skip)))


class EMCADDecoder(nn.Module):
    """EMCAD with a head for each scale.

    Attributes:
        deep_supervision: whether all heads give logits, or the finest alone; nnU-Net switches it.
        seg_layers: the heads, coarsest first; nnU-Net knows them by this name, and their order is that of its own.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, deep_supervision: bool = True):
        """Make it with random weights.

        Args:
            channels: of the encoder's features, finest first.
            num_classes: of the logits.
            deep_supervision: as the attribute; a head that gives nothing from the start is not trained.
        """
        super().__init__()
        self.deep_supervision = deep_supervision
        channels = channels[::-1]  # coarsest first, as they are computed
        self.up = nn.ModuleList(UpConvolution(i, o) for i, o in pairwise(channels))
        self.gates = nn.ModuleList(map(AttentionGate, channels[1:]))
        self.channel_attention = nn.ModuleList(map(ChannelAttention, channels))
        self.spatial_attention = SpatialAttention()
        self.convolutions = nn.ModuleList(map(MultiScaleConvolution, channels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # small weights, as in the authors' network
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.seg_layers = nn.ModuleList(convolution(c, num_classes, bias=True) for c in channels)
        self.seg_layers[:-1].requires_grad_(deep_supervision)  # DDP would wait for their gradients

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Logits, ``(B, num_classes, H, W)`` of the size of the features, finest first.

        Args:
            features: of the encoder, finest first; each ``(B, channels, H, W)`` and half the size of the one before.
        """
        *skips, x = features
        decoded = [self._refine(0, x)]
        for i, (up, gate, skip) in enumerate(zip(self.up, self.gates, reversed(skips), strict=True), 1):
            x = up(decoded[-1])
            decoded.append(self._refine(i, x + gate(x, skip)))
        heads = self.seg_layers if self.deep_supervision else self.seg_layers[-1:]
        return [head(x) for head, x in zip(reversed(heads), reversed(decoded), strict=False)]

    def _refine(self, i: int, x: Tensor) -> Tensor:
        """MSCAM: attention over channels, over pixels, and the multi-scale convolution."""
        return self.convolutions[i](self.spatial_attention(self.channel_attention[i](x)))


class EMCADNetwork(nn.Module):
    """PVT-V2-B2 and EMCAD, for images of any size and number of channels.

    With 1 channel and 9 classes it has 26 772 635 parameters, as the authors' network.
    """

    def __init__(self, num_channels: int, num_classes: int, deep_supervision: bool = True):
        """Make it with random weights.

        Args:
            num_channels: of the image. Three go into the encoder as they are; any other number is mixed to three by a
                1×1 convolution with batch norm and ReLU, as the authors do it with one.
            num_classes: of the logits.
            deep_supervision: whether it gives four outputs; ``decoder.deep_supervision`` switches it later.
        """
        super().__init__()
        mix = nn.Sequential(nn.Conv2d(num_channels, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.to_three_channels = nn.Identity() if num_channels == 3 else mix
        self.encoder = PVTEncoder()
        self.decoder = EMCADDecoder(CHANNELS, num_classes, deep_supervision)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """The logits at full resolution, or a list of four, finest first, with these as the first.

        Args:
            image: ``(B, num_channels, H, W)``.

        Returns:
            ``(B, num_classes, H, W)``; with deep supervision a list, whose sizes are ``(H, W)`` divided by
            :func:`~nnunet_lomix.networks.alignment.output_strides`.
        """
        features = self.encoder(self.to_three_channels(pad(image)))
        outputs = align(self.decoder(features), image.shape[2:])
        return outputs if self.decoder.deep_supervision else outputs[0]
