"""Which maps: all subsets of the mixed scales, once for each operator."""

import pytest

from nnunet_lomix.loss.maps import ORIGINAL, Map, list_maps

from . import oracle


@pytest.mark.parametrize("num_scales", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("operators", [(), ("add",), ("add", "multiply", "concat", "fusion")])
def test_maps_are_the_originals_and_each_operator_of_each_subset(num_scales, operators):
    for mixed_scales in range(1, num_scales + 1):
        maps = list_maps(num_scales, mixed_scales, operators)
        originals = [(ORIGINAL, (j,)) for j in range(num_scales)]
        assert [(m.operator, m.scales) for m in maps[:num_scales]] == originals
        mutants = {(operator, c) for operator in operators for c in oracle.subsets(mixed_scales)}
        assert {(m.operator, m.scales) for m in maps[num_scales:]} == mutants
        assert len(maps) == num_scales + len(operators) * (2**mixed_scales - mixed_scales - 1)


@pytest.mark.parametrize(("mixed_scales", "count"), [(3, 19), (4, 48), (5, 109)])
def test_number_of_maps_of_the_paper(mixed_scales, count):
    assert len(list_maps(mixed_scales, mixed_scales, ("add", "multiply", "concat", "fusion"))) == count


def test_names_are_unique_and_readable():
    maps = list_maps(5, 5, ("add", "multiply"))
    assert len({m.name for m in maps}) == len(maps)
    assert Map(ORIGINAL, (0,)).name == "z_0"
    assert (Map("add", (0, 2)).name, Map("add", (0, 2)).subset) == ("add_0_2", "0+2")
