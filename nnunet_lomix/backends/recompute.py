"""One map at a time: the backward pass computes each map again instead of keeping it."""

from torch.utils.checkpoint import checkpoint

from nnunet_lomix.backends.base import BACKENDS, resample
from nnunet_lomix.terms import Statistics


@BACKENDS.register("recompute")
def recompute(outputs, target, mixers, terms) -> Statistics:
    """Memory: the S resampled outputs with their gradients, and one map; not more for more maps."""
    scales = [resample(z, target.size) for z in outputs]

    def sums(mix, *mixed):
        s = terms.statistics(mix(list(mixed)), target)
        return s.cross_entropy, s.intersection, s.volume  # checkpoint passes gradients through tuples only

    return Statistics.stack(
        [
            Statistics(*checkpoint(sums, mix, *(scales[j] for j in c), use_reentrant=False, preserve_rng_state=False))
            for mix, c in mixers
        ]
    )
