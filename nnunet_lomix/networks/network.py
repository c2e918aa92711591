"""The paper's network: PVT-V2-B2, EMCAD, and four outputs that fit an image of any size."""

from torch import Tensor, nn

from nnunet_lomix.networks.alignment import align, pad
from nnunet_lomix.networks.emcad import EMCADDecoder
from nnunet_lomix.networks.pvt import CHANNELS, PVTEncoder


class EMCADNetwork(nn.Module):
    """PVT-V2-B2 and EMCAD (Rahman et al., CVPR 2024, arXiv 2405.06880), for images of any size and number of channels.

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
