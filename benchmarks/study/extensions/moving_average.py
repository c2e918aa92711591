"""What a rule remembers of noisy values."""

from torch import Tensor


def update_mean(mean: Tensor, new: Tensor, momentum: float, first: bool) -> None:
    """One step of an exponential moving average, in place.

    Values that aren't finite leave the mean as it is: under mixed precision some steps overflow.

    Args:
        mean: any shape.
        new: of the same shape.
        momentum: how much of the old mean is kept, 0 to 1.
        first: whether ``new`` is the first value, with which the mean starts.
    """
    new = new.where(new.isfinite(), mean)
    mean.lerp_(new, 1.0 if first else 1 - momentum)
