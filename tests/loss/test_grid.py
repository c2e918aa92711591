"""The grid: F.interpolate and slicing, by matrix products; every pixel once in a cycle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nnunet_lomix import LoMixLoss
from nnunet_lomix.loss.grid import Grid

CPU = torch.device("cpu")


@st.composite
def sizes_of_outputs(draw):
    """Of two to four outputs, 2D or 3D, odd, anisotropic, each coarser than the one before or as fine."""
    fine = draw(st.one_of(*(st.tuples(*[st.integers(1, top)] * n) for n, top in ((2, 12), (3, 7)))))
    sizes = [fine]
    for _ in range(draw(st.integers(1, 3))):
        sizes.append(tuple(draw(st.integers(1, n)) for n in sizes[-1]))
    return sizes


def grid_of(sizes, stride, dtype=torch.float64):
    return Grid(sizes, stride, CPU, dtype)


@settings(max_examples=60)
@given(sizes=sizes_of_outputs(), stride=st.integers(1, 3), step=st.integers(0, 30), rows=st.integers(1, 12))
def test_scales_on_the_grid_are_interpolated_and_then_sliced(sizes, stride, step, rows):
    grid = grid_of(sizes, stride)
    offset = grid.offset(torch.tensor(step))
    outputs = [torch.randn(2, 3, *size, dtype=torch.float64) for size in sizes]
    mode = "bilinear" if len(sizes[0]) == 2 else "trilinear"
    slabs = [grid.scales(*slab) for slab in grid.slabs(outputs, offset, rows)]
    got = [torch.cat(parts, 2) for parts in zip(*slabs, strict=True)]
    for z, scale in zip(outputs, got, strict=True):
        full = F.interpolate(z, sizes[0], mode=mode, align_corners=False)
        expected = grid.select(full, offset)
        torch.testing.assert_close(scale, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=60)
@given(sizes=sizes_of_outputs(), stride=st.integers(1, 3), first=st.integers(0, 50))
def test_a_cycle_of_steps_uses_every_pixel_once(sizes, stride, first):
    grid = grid_of(sizes, stride)
    strides = [min(stride, n) if 2 * m <= n + 1 and m < n else 1 for n, m in zip(*sizes[:2], strict=True)]
    assert grid.strides == strides and grid.cycle == torch.tensor(strides).prod()
    numbers = torch.arange(1, torch.Size(sizes[0]).numel() + 1).view(1, 1, *sizes[0])
    offsets = [grid.offset(torch.tensor(step)) for step in range(first, first + grid.cycle)]
    used = [grid.select(numbers, o) if o.inside is None else grid.select(numbers, o)[o.inside > 0] for o in offsets]
    assert sorted(torch.cat([pixels.flatten() for pixels in used]).tolist()) == numbers.flatten().tolist()


@pytest.mark.parametrize(
    ("sizes", "strides"),
    [
        ([(8, 8), (4, 4)], [2, 2]),
        ([(20, 256, 256), (20, 128, 128), (10, 64, 64)], [1, 2, 2]),  # few thick slices
        ([(9, 8), (5, 4)], [2, 2]),
        ([(224, 224), (28, 28)], [2, 2]),  # EMCAD
        ([(8, 9), (6, 9)], [1, 1]),
        ([(8, 1), (4, 1)], [2, 1]),
    ],
)
def test_which_axes_are_thinned_out(sizes, strides):
    assert grid_of(sizes, 2).strides == strides


def test_the_offset_follows_from_the_number_of_the_step_alone_and_is_0_without_gradients():
    """So that ranks, resumed trainings and arms agree; a validation doesn't depend on when it is."""
    loss = LoMixLoss(2, 2, (), rule="equal", stride=2, share=0)
    outputs = [torch.zeros(1, 2, 8, 8, requires_grad=True), torch.zeros(1, 2, 4, 4)]
    target = torch.zeros(1, 1, 8, 8)
    used = []
    for _ in range(5):
        with torch.no_grad():  # a validation in between
            loss(outputs, target)
        loss(outputs, target).backward()
        used.append(outputs[0].grad[0, 0] != 0)
        outputs[0].grad = None
    assert torch.equal(used[4], used[0]) and torch.equal(sum(u.int() for u in used[:4]), torch.ones(8, 8).int())
    resumed = LoMixLoss(2, 2, (), rule="equal", stride=2, share=0)
    resumed.load_state_dict(loss.state_dict())
    resumed(outputs, target).backward()
    assert torch.equal(outputs[0].grad[0, 0] != 0, used[1])
    other = outputs[0].detach().clone()
    other[:, 0, 1::2] = other[:, 0, :, 1::2] = 3.0
    with torch.no_grad():
        assert torch.equal(loss.losses([other, outputs[1]], target), loss.losses(outputs, target))
