"""The reference: every map is materialised and keeps its graph until the backward pass."""

from collections.abc import Sequence

from torch import Tensor

from nnunet_lomix.loss.backends.base import BACKENDS, BoundMap, Case, of_chosen, resample
from nnunet_lomix.loss.criterion import Criterion, PixelSums, Target, TargetSums

MOST_VALUES = 2**25  # of all maps together, if nobody asks for this backend: less than a gigabyte of memory


@BACKENDS.register("plain")
class Plain:
    """Memory: 3 to 4 full-resolution tensors for each map. The fastest where maps are small."""

    priority = 2

    def unsupported(self, case: Case) -> str | None:
        return None

    def suits(self, case: Case) -> bool:
        return case.shape.numel() * case.evaluated <= MOST_VALUES

    def __call__(
        self,
        outputs: Sequence[Tensor],
        target: Target,
        maps: Sequence[BoundMap],
        criterion: Criterion,
        chosen: Tensor | None = None,
    ) -> tuple[PixelSums, TargetSums]:
        resampled = [resample(z, target.size) for z in outputs]
        part = criterion.part(target)

        def compute(maps: Sequence[BoundMap]) -> PixelSums:
            logits = (operator([resampled[j] for j in scales]) for operator, scales in maps)
            return PixelSums.stack([criterion.pixel_sums(z, part) for z in logits])

        return of_chosen(compute, maps, chosen), criterion.target_sums(target)
