"""Outputs of images of any size lie where their targets do."""

import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from hypothesis import given
from hypothesis import strategies as st

from nnunet_lomix.networks.alignment import HEAD_STRIDES, align, output_strides, pad

SIZES = st.tuples(st.integers(1, 150), st.integers(1, 150))


def of_heads(image):
    """What heads would give that return the image: its means over squares."""
    return [torch.nn.functional.avg_pool2d(image, stride) for stride in HEAD_STRIDES]


@given(SIZES)
def test_strides_are_the_coarsest_that_divide_the_size(size):
    finest, *others = output_strides(size)
    assert finest == [1, 1]
    for strides, head_stride in zip(others, HEAD_STRIDES[1:], strict=True):
        assert strides == [max(s for s in (1, 2, 4, 8, 16, 32) if s <= head_stride and n % s == 0) for n in size]


@given(SIZES)
def test_outputs_have_the_sizes_that_nnunet_gives_the_targets(size):
    outputs = align(of_heads(pad(torch.zeros(1, 2, *size))), size)
    scales = [[1 / s for s in strides] for strides in output_strides(size)]
    targets = DownsampleSegForDSTransform(scales)(segmentation=torch.zeros(1, *size))["segmentation"]
    assert [z.shape[2:] for z in outputs] == [t.shape[1:] for t in targets]
    assert outputs[0].shape == (1, 2, *size)


@pytest.mark.parametrize("size", [(160, 192), (148, 168), (150, 129), (136, 131)])
def test_each_pixel_of_an_output_is_where_it_is_in_the_image(size):
    """Heads that return the coordinates of their pixels' centres: outputs do, too, but where there is no neighbour."""
    padded = [length + -length % 32 for length in size]
    coordinates = torch.stack(torch.meshgrid(*(torch.arange(n) + 0.5 for n in padded), indexing="ij"))[None]
    for z, strides in zip(align(of_heads(coordinates), size), output_strides(size), strict=True):
        for axis, stride in enumerate(strides):
            centres = stride * (torch.arange(size[axis] // stride) + 0.5)
            found = z[0, axis].movedim(axis, -1)
            inner = (centres > 16) & (centres < size[axis] - 32)
            assert inner.any()
            torch.testing.assert_close(found[..., inner], centres[inner].expand_as(found[..., inner]))


def test_padding_is_right_and_below_and_zero():
    image = torch.rand(2, 3, 30, 65)
    padded = pad(image)
    assert padded.shape == (2, 3, 32, 96)
    assert torch.equal(padded[..., :30, :65], image)
    assert padded.count_nonzero() == image.count_nonzero()


def test_the_finest_head_alone():
    logits = of_heads(torch.rand(1, 2, 64, 64))
    assert torch.equal(align(logits[:1], (40, 50))[0], align(logits, (40, 50))[0])
