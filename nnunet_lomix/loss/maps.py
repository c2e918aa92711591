"""Which maps are supervised: the outputs of the decoder and their mutants (paper, section 3.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

ORIGINAL = "original"


@dataclass(frozen=True)
class Map:
    """An original output of the decoder, or a mutant: an operator applied to a subset of the scales.

    Attributes:
        operator: name of the operator, or ``ORIGINAL``.
        scales: indices of the scales, ascending; 0 is the finest, the one that inference uses.
    """

    operator: str
    scales: tuple[int, ...]

    @property
    def subset(self) -> str:
        """The scales as text, ``"0+2"``."""
        return "+".join(map(str, self.scales))

    @property
    def name(self) -> str:
        """``z_0`` for an original, ``add_0_2`` for a mutant: safe in files, tables and parameter names."""
        return "_".join(["z" if self.operator == ORIGINAL else self.operator, *map(str, self.scales)])


def list_maps(num_scales: int, mixed_scales: int, operators: Sequence[str]) -> list[Map]:
    """All maps of LoMix: the originals of S scales, then for each operator its mutants.

    These are the mutants of every subset of at least two of the ``mixed_scales`` (K) finest scales, so
    there are ``num_scales + len(operators) * (2**K - K - 1)`` maps.
    """
    originals = [Map(ORIGINAL, (j,)) for j in range(num_scales)]
    subsets = [c for size in range(2, mixed_scales + 1) for c in combinations(range(mixed_scales), size)]
    return originals + [Map(operator, subset) for operator in operators for subset in subsets]
