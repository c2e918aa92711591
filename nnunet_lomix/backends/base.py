"""What the backends share."""

import logging
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_lomix.registry import Registry

BACKENDS = Registry("backend")
logger = logging.getLogger(__name__)


@cache
def log_once(message: str):
    logger.warning(message)


def resample(logits: Tensor, size: torch.Size) -> Tensor:
    """ẑ: logits ``(B, C, *spatial)`` at ``size``, bilinear or trilinear, pixels flattened: ``(B, C, N)``."""
    if logits.shape[2:] != size:
        mode = "bilinear" if logits.ndim == 4 else "trilinear"
        logits = F.interpolate(logits, size, mode=mode, align_corners=False)
    return logits.flatten(2)


def full_precision(device_type: str):
    """A context in which autocast is off, on devices that have autocast at all."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
