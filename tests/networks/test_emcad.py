"""The blocks of EMCAD against their formulas, and the network against what was measured on the authors'."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nnunet_lomix.networks.emcad import (
    AttentionGate,
    ChannelAttention,
    EMCADDecoder,
    EMCADNetwork,
    MultiScaleConvolution,
    SpatialAttention,
    UpConvolution,
)


@pytest.fixture(scope="module")
def network():
    """Of the authors' measurement: one channel, nine classes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # for one in some dozens all units of a small attention over channels give nothing
    return EMCADNetwork(1, 9)


def random(module):
    """The module in float64, as after a training: all that it has is random, and its statistics are used."""
    generator = torch.Generator().manual_seed(0)
    module = module.double().eval()
    for name, t in module.state_dict().items():
        if t.is_floating_point():
            t.copy_(torch.rand(t.shape, generator=generator) + (0.1 if "running_var" in name else -0.5))
    return module


def image(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def normalise(x, norm):
    """Batch norm by its statistics."""
    mean, var, weight, bias = (t[:, None, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def mix(x, convolution):
    """A point-wise convolution, as a product of matrices."""
    y = torch.einsum("oc,bchw->bohw", convolution.weight[:, :, 0, 0], x)
    return y if convolution.bias is None else y + convolution.bias[:, None, None]


def correlate(x, kernels, inputs):
    """Each output is the sum over some inputs of what a kernel gives, by loops over the kernel's pixels.

    Args:
        kernels: (outputs, len(inputs[o]), k, k)
        inputs: of each output the numbers of its input channels.
    """
    k = kernels.shape[-1]
    padded = F.pad(x, [k // 2] * 4)
    outputs = x.new_zeros(len(x), len(kernels), *x.shape[2:])
    for o, (kernel, channels) in enumerate(zip(kernels, inputs, strict=True)):
        for c, channel in enumerate(channels):
            for i, j in np.ndindex(k, k):
                outputs[:, o] += kernel[c, i, j] * padded[:, channel, i : i + x.shape[2], j : j + x.shape[3]]
    return outputs


def test_channel_attention():
    block, x = random(ChannelAttention(32)), image(2, 32, 3, 4)
    into, _, out = block.weigh
    squeezed = [x.flatten(2).mean(2)[:, :, None, None], x.flatten(2).max(2).values[:, :, None, None]]
    weights = torch.sigmoid(sum(mix(mix(s, into).clamp(min=0), out) for s in squeezed))
    torch.testing.assert_close(block(x), weights * x)


def test_spatial_attention():
    block, x = random(SpatialAttention()), image(2, 5, 6, 7)
    statistics = torch.stack([x.mean(1), x.max(1).values], 1)
    assert block.weigh.weight.shape == (1, 2, 7, 7)
    weights = torch.sigmoid(correlate(statistics, block.weigh.weight, [(0, 1)]))
    torch.testing.assert_close(block(x), weights * x)


def test_multi_scale_convolution():
    block, x = random(MultiScaleConvolution(3)), 30 * image(2, 3, 5, 6)
    expanded = normalise(mix(x, block.expand[0]), block.expand[1]).clamp(0, 6)
    assert expanded.shape[1] == 6 and expanded.max() == 6
    with torch.no_grad():
        for branch in block.depthwise:
            branch[0].weight.mul_(5)  # so that these, too, reach their bound
    total = 0
    for branch, kernel in zip(block.depthwise, (1, 3, 5), strict=True):
        assert branch[0].weight.shape == (6, 1, kernel, kernel)
        own = [(channel,) for channel in range(6)]
        total = total + normalise(correlate(expanded, branch[0].weight, own), branch[1]).clamp(0, 6)
    shuffled = total[:, [0, 2, 4, 1, 3, 5]]  # groups of two: first those that are first in theirs
    expected = x + normalise(mix(shuffled, block.project[1]), block.project[2])
    torch.testing.assert_close(block(x), expected)


def test_up_convolution():
    block, x = random(UpConvolution(3, 2)), image(2, 3, 4, 5)
    enlarged = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    depthwise, norm, _ = block.depthwise
    filtered = normalise(correlate(enlarged, depthwise.weight, [(c,) for c in range(3)]), norm).clamp(min=0)
    torch.testing.assert_close(block(x), mix(filtered, block.pointwise))


def test_attention_gate():
    block, x, skip = random(AttentionGate(6)), image(2, 6, 4, 5), image(2, 6, 5, 4).transpose(2, 3)
    pairs = [(0, 1), (2, 3), (4, 5)]
    sides = [
        normalise(correlate(y, side[0].weight, pairs) + side[0].bias[:, None, None], side[1])
        for y, side in ((x, block.of_decoder), (skip, block.of_skip))
    ]
    gate = torch.sigmoid(normalise(mix(sum(sides).clamp(min=0), block.weigh[0]), block.weigh[1]))
    assert gate.shape == (2, 1, 4, 5)
    torch.testing.assert_close(block(x, skip), gate * skip)


def test_decoder():
    channels = (16, 32, 48, 64)
    decoder = random(EMCADDecoder(channels, 5))
    features = [image(1, c, 32 >> j, 24 >> j) for j, c in enumerate(channels)]
    expected, x = [], features[3]
    for i in range(4):
        if i > 0:
            x = decoder.up[i - 1](x)
            x = x + decoder.gates[i - 1](x, features[3 - i])
        x = decoder.convolutions[i](decoder.spatial_attention(decoder.channel_attention[i](x)))
        expected.insert(0, mix(x, decoder.seg_layers[i]))
    logits = decoder(features)
    assert [z.shape for z in logits] == [(1, 5, 32 >> j, 24 >> j) for j in range(4)]
    for z, e in zip(logits, expected, strict=True):
        torch.testing.assert_close(z, e)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_are_as_many_as_in_the_authors_network(network):
    assert count(network.to_three_channels) == 12
    assert count(network.encoder) == 24_849_856
    assert count(network.decoder) - count(network.decoder.seg_layers) == 1_913_515
    assert count(network) == 26_772_635


def test_multiply_adds_are_as_many_as_in_the_authors_network(network):
    """Of convolutions, linear layers and both products of the attention; nothing else is counted.

    Without those of the attention it would be 4.25 billion. torch counts two operations for each, and sees those of the
    attention only where no fused kernel does them.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network.eval()(torch.zeros(1, 1, 224, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(4.40e9, abs=5e6)


@pytest.mark.parametrize("size", [(64, 96), (33, 20), (7, 5)])
def test_outputs_fit_images_of_any_size(network, size):
    x = torch.randn(2, 1, *size)
    network.eval()
    with torch.no_grad():
        outputs = network(x)
        network.decoder.deep_supervision = False
        finest = network(x)
        network.decoder.deep_supervision = True
    assert torch.equal(finest, outputs[0]) and finest.shape == (2, 9, *size)
    assert len(outputs) == 4
    assert all(z.isfinite().all() and z.shape[:2] == (2, 9) for z in outputs)
    if size == (64, 96):
        assert [z.shape[2:] for z in outputs[1:]] == [(8, 12), (4, 6), (2, 3)]


def test_all_parameters_are_trained(network):
    network.train().zero_grad()
    sum(z.square().mean() for z in network(image(2, 1, 64, 64).float())).backward()
    # a constant that is added before a batch norm is taken away by it
    removed = ("to_three_channels.0.bias", "of_decoder.0.bias", "of_skip.0.bias", "weigh.0.bias")
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.any() or name.endswith(removed), name


def test_a_coarse_head_that_gives_nothing_is_not_trained():
    decoder = EMCADDecoder((16, 16, 16, 16), 2, deep_supervision=False)
    logits = decoder([torch.randn(2, 16, 16 >> j, 16 >> j) for j in range(4)])
    sum(z.sum() for z in logits).backward()
    assert len(logits) == 1
    assert all((p.grad is not None) == p.requires_grad for p in decoder.parameters())
    assert [p.requires_grad for p in decoder.seg_layers.parameters()] == [False] * 6 + [True] * 2


def test_three_channels_go_into_the_encoder_as_they_are_and_others_are_mixed():
    assert isinstance(EMCADNetwork(3, 2).to_three_channels, nn.Identity)
    network = EMCADNetwork(5, 2).eval()
    assert count(network.to_three_channels) == 5 * 3 + 3 + 6
    assert network(torch.randn(1, 5, 32, 32))[0].shape == (1, 2, 32, 32)
