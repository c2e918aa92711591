"""The encoder, PVT-V2-B2 (Wang et al., arXiv 2106.13797), by timm, and its pretrained weights, if they are at hand."""

import os
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from timm.models import load_state_dict
from timm.models.pvt_v2 import checkpoint_filter_fn, pvt_v2_b2
from torch import Tensor, nn

from nnunet_lomix.errors import LoMixError, explaining

NAME = "PVT-V2-B2"
CHANNELS = (64, 128, 320, 512)
VARIABLE = "NNUNET_LOMIX_PVT_WEIGHTS"
HUB = "timm/pvt_v2_b2.in1k"  # where timm has them from; trained on ImageNet-1k
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


class PVTEncoder(nn.Module):
    """Features at strides 4, 8, 16 and 32, of ``CHANNELS`` channels, of an image with 3 channels.

    Its keys are those of timm's model. A training leaves out residual branches at random, as PVT-V2's own (0 for the
    first to 0.1 for the last one).
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = pvt_v2_b2(num_classes=0, drop_path_rate=0.1)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features, finest first, each ``(B, channels, H / stride, W / stride)``.

        Args:
            image: ``(B, 3, H, W)``, sides divisible by 32.
        """
        x = self.model.patch_embed(image)
        features = []
        for stage in self.model.stages:
            features.append(x := stage(x))
        return features


def load_pretrained(encoder: PVTEncoder) -> str:
    """Give the encoder pretrained weights, if they are on this machine; nothing is downloaded.

    They are the file that ``NNUNET_LOMIX_PVT_WEIGHTS`` names, timm's or PVT-V2's own; without that variable what timm
    has downloaded before, in the cache of huggingface_hub.

    Returns:
        Where the encoder's weights come from, one sentence for a log.

    Raises:
        LoMixError: the variable names no file, or one that has other weights.
    """
    file = _find_file()
    if file is None:
        return (
            f"The encoder {NAME} starts from random weights: the cache of huggingface_hub doesn't have {HUB}, and "
            f"{VARIABLE}, which may name a file, is not set."
        )
    with explaining(f"{file} has no weights of {NAME}; name another file in {VARIABLE}, pvt_v2_b2 of timm or PVT-V2"):
        # weights_only: loading a stranger's file must not run code
        state = checkpoint_filter_fn(load_state_dict(str(file), weights_only=True), encoder.model)
        encoder.model.load_state_dict({key: w for key, w in state.items() if not key.startswith("head.")})
    return f"The encoder {NAME} starts from pretrained weights: {file}."


def _find_file() -> Path | None:
    named = os.environ.get(VARIABLE)
    if named:
        if not Path(named).is_file():
            raise LoMixError(f"{named} is no file: name the weights of {NAME} in {VARIABLE}, or unset it.")
        return Path(named)
    cached = (try_to_load_from_cache(HUB, file) for file in HUB_FILES)
    return next((Path(file) for file in cached if isinstance(file, str)), None)
