"""The reference: every map is materialised and keeps its graph until the backward pass."""

from nnunet_lomix.backends.base import BACKENDS, resample
from nnunet_lomix.terms import Statistics


@BACKENDS.register("plain")
def plain(outputs, target, mixers, terms) -> Statistics:
    """Memory: 3 to 4 full-resolution tensors for each map."""
    scales = [resample(z, target.size) for z in outputs]
    truth = terms.truth(target)
    return Statistics.stack([terms.statistics(mix([scales[j] for j in c]), truth) for mix, c in mixers])
