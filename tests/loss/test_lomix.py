"""The whole loss against the oracle, over backends, shapes, operators and dtypes."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from nnunet_lomix import LoMixLoss
from nnunet_lomix.loss import DEFAULT_OPERATORS, OPERATORS, RULES, SamplingLoMixLoss
from nnunet_lomix.loss.backends import lean

from . import oracle

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def randomise(loss, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in loss.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    loss.rule.steps = 1  # the weights are the random ones
    return loss


def tensors(outputs, target, device, dtype=torch.float64):
    outputs = [torch.from_numpy(z).to(device, dtype).requires_grad_() for z in outputs]
    return outputs, torch.from_numpy(target).to(device)


@st.composite
def cases(draw, operators=tuple(OPERATORS)):
    """Arguments of the loss, sizes of the outputs, batch size and seed; odd sizes, anisotropic strides."""
    size = draw(st.one_of(*(st.tuples(*[st.integers(1, top)] * n) for n, top in ((2, 7), (3, 4)))))
    sizes = [size]
    for _ in range(draw(st.integers(1, 4))):
        strides = draw(st.tuples(*[st.integers(1, 3)] * len(size)))
        sizes.append(tuple(-(-n // stride) for n, stride in zip(sizes[-1], strides, strict=True)))
    regions, rule = draw(st.booleans()), draw(st.sampled_from(sorted(RULES)))
    classes = draw(st.integers(1 if regions else 2, 4))
    arguments = {
        "num_classes": classes,
        "num_scales": len(sizes),
        "mixed_scales": len(sizes) - draw(st.integers(0, len(sizes) - 1)),
        "operators": draw(st.lists(st.sampled_from(sorted(operators)), unique=True, min_size=2, max_size=4)),
        "rule": rule,
        "share": 0.0 if rule == "softplus" else draw(st.sampled_from([0.0, 0.5, 1.0])),
        "regions": regions,
        "ignore_label": classes if draw(st.booleans()) else None,
        "batch_dice": draw(st.booleans()),
    }
    return arguments, sizes, draw(st.integers(1, 2)), draw(st.integers(0, 999))


FIVE_SCALES = (
    {
        "num_classes": 3,
        "num_scales": 5,
        "mixed_scales": 5,
        "operators": DEFAULT_OPERATORS,
        "rule": "barrier",
        "share": 0.5,
        "regions": False,
        "ignore_label": 3,
        "batch_dice": True,
    },
    [(3, 6, 5), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)],
    2,
    0,
)  # 109 maps


def build(case, backend, device):
    """The loss of a case with random parameters, and the outputs and the target as arrays."""
    arguments, sizes, batch, seed = case
    loss = randomise(LoMixLoss(**arguments, backend=backend).double(), seed).to(device)
    regions, ignore = arguments["regions"], arguments["ignore_label"] is not None
    classes = arguments["num_classes"]
    return loss, *oracle.example(sizes, batch=batch, classes=classes, regions=regions, ignore=ignore, seed=seed)


def oracle_losses(loss, arguments, outputs, target):
    """The loss of each map, map after map."""
    losses = []
    full = [oracle.resample(z, outputs[0].shape[2:]) for z in outputs]
    ignore, batch_dice = arguments["ignore_label"], arguments["batch_dice"]
    for map_ in loss.maps:
        parameters = {k: v.detach().cpu().numpy() for k, v in loss.operators[map_.name].named_parameters()}
        mixed = oracle.map_logits(map_.operator, [full[j] for j in map_.scales], parameters)
        if arguments["regions"]:
            losses.append(oracle.region_loss(mixed, target, batch_dice=batch_dice, ignore=ignore is not None))
        else:
            losses.append(oracle.class_loss(mixed, target, batch_dice=batch_dice, ignore=ignore))
    return np.array(losses)


@pytest.mark.parametrize("backend", ["plain", "lean"])
@settings(max_examples=60, deadline=None, derandomize=True)
@example(case=FIVE_SCALES)
@given(case=cases())
def test_losses_weights_and_total_equal_the_oracle(backend, device, case):
    arguments, *_ = case
    loss, outputs, target = build(case, backend, device)
    expected = oracle_losses(loss, arguments, outputs, target)
    theta = getattr(loss.rule, "theta", torch.zeros(len(expected))).detach().cpu().numpy()
    weights = oracle.effective_weights(arguments["rule"], theta, arguments["share"])

    outputs, target = tensors(outputs, target, device)
    total = loss(outputs, [target, None])  # nnU-Net gives a list of targets
    np.testing.assert_allclose(loss.losses(outputs, target).detach().cpu(), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(loss.weights().cpu(), weights, rtol=1e-9)
    np.testing.assert_allclose(total.item(), weights @ expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@example(case=FIVE_SCALES)
@given(case=cases(DEFAULT_OPERATORS))
def test_lean_in_single_precision(device, case):
    results = []
    for backend, dtype in (("lean", torch.float32), ("plain", torch.float64)):
        loss, *arrays = build(case, backend, device)
        outputs, target = tensors(*arrays, device, dtype)
        losses = loss.to(dtype).losses(outputs, target)
        factors = torch.linspace(0.5, 2, len(losses), dtype=dtype, device=device)
        gradients = torch.autograd.grad((factors * losses).sum(), [*outputs, *loss.operators.parameters()])
        results.append([losses.double(), *(g.double() for g in gradients)])
    for ours, exact in zip(*results, strict=True):
        # 1e-6: a gradient that is zero but for rounding is a sum of terms of about 1
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6 + 1e-4 * exact.abs().max().item())


# a row and a map at a time, some of both, and all at once
@pytest.mark.parametrize(("values", "threads"), [(1, 1), (200, 1), (200, 3), (10**6, 1)])
@settings(max_examples=15, deadline=None, derandomize=True)
@example(case=FIVE_SCALES)
@given(case=cases())
def test_lean_equals_plain_in_parts_of_any_size(values, threads, device, case):
    gradients = []
    for backend in ("plain", "lean"):
        loss, *arrays = build(case, backend, device)
        outputs, target = tensors(*arrays, device)
        patched = mock.patch.object(torch, "get_num_threads", return_value=threads)
        with mock.patch.object(lean, "VALUES", {device.type: values}), patched:
            loss(outputs, target).backward()
        gradients.append({str(i): z.grad for i, z in enumerate(outputs)})
        gradients[-1].update({k: p.grad for k, p in loss.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("sizes", [[(3, 4), (2, 2)], [(1, 3, 2), (1, 2, 1)]])
@pytest.mark.parametrize("backend", ["plain", "lean"])
def test_gradcheck(backend, sizes, regions, device):
    loss = randomise(LoMixLoss(2, 2, regions=regions, ignore_label=2, backend=backend).double(), 0).to(device)
    outputs, target = tensors(*oracle.example(sizes, batch=1, classes=2, regions=regions, ignore=True), device)
    # gradcheck moves the tensors in place, so the module sees its own parameters move
    parameters = list(loss.operators.parameters())
    assert gradcheck(lambda *_: loss.losses(outputs, target), [*outputs, *parameters])
    assert gradcheck(lambda *_: loss(outputs, target), outputs)


LAYOUTS = {
    "channels last": lambda z: z.to(memory_format=torch.channels_last if z.ndim == 4 else torch.channels_last_3d),
    "axes in another order": lambda z: z.mT.contiguous().mT,
    "every other value": lambda z: z.repeat_interleave(2, -1)[..., ::2],
    "a part of more channels": lambda z: torch.cat([z, z], 1)[:, : z.shape[1]],
}


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("sizes", [[(5, 4), (3, 2), (2, 2)], [(3, 4, 5), (3, 2, 3), (1, 2, 2)]])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["plain", "lean"])
def test_layout_in_memory_does_not_matter(backend, layout, sizes, regions, device):
    loss = randomise(LoMixLoss(3, 3, regions=regions, ignore_label=3, backend=backend).double(), 0).to(device)
    arrays = oracle.example(sizes, regions=regions, ignore=True)
    results = []
    for arrange in (torch.clone, LAYOUTS[layout]):
        outputs, target = tensors(*arrays, device)
        arranged = [arrange(z) for z in outputs]
        assert arrange is torch.clone or not any(z.is_contiguous() for z in arranged)
        loss.zero_grad()
        loss(arranged, arrange(target)).backward()
        results.append([z.grad for z in outputs] + [p.grad for p in loss.parameters()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["plain", None])
def test_a_small_loss_is_one_graph_for_torch_compile(backend):
    loss = LoMixLoss(3, 3, backend=backend)
    outputs, target = tensors(*oracle.example([(8, 8), (4, 4), (2, 2)]), CPU, torch.float32)
    compiled = torch.compile(loss.losses, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(outputs, target), loss.losses(outputs, target))


def test_every_mutant_has_parameters_of_its_own():
    loss = LoMixLoss(3, 4)
    parameters = [(m.scales, p) for m in loss.maps for p in loss.operators[m.name].parameters()]
    assert len({p.data_ptr() for _, p in parameters}) == len(parameters) == 11 * 2 * 2
    for p in dict(loss.operators.named_parameters()).values():
        assert p.requires_grad


@pytest.mark.parametrize("backend", ["plain", "lean"])
def test_every_parameter_is_trained_from_the_start(backend):
    loss = LoMixLoss(3, 3, backend=backend).double()
    outputs, target = tensors(*oracle.example([(8, 8), (4, 4), (2, 2)]), CPU)
    loss(outputs, target).backward()
    for name, parameter in loss.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("backend", ["plain", "lean"])
def test_concat_and_fusion_start_with_the_loss_of_the_mean(backend):
    outputs, target = tensors(*oracle.example([(8, 8), (4, 4), (2, 2)]), CPU)
    loss = LoMixLoss(3, 3, operators=["average", "concat", "fusion"], backend=backend).double()
    average, concat, fusion = loss.losses(outputs, target)[3:].view(3, -1)
    torch.testing.assert_close(concat, average)
    torch.testing.assert_close(fusion, average)


def test_no_random_numbers_are_drawn():
    """So a training has the same random state with and without the loss."""
    state = torch.get_rng_state()
    loss = LoMixLoss(3, 3, operators=list(OPERATORS))
    outputs, target = tensors(*oracle.example([(8, 8), (4, 4), (2, 2)]), CPU, torch.float32)
    loss(outputs, target).backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backend", ["plain", "lean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1, 16, 40])
def test_half_precision_outputs_are_computed_in_fp32(magnitude, dtype, backend, device):
    """Under autocast or not; four logits of 16 are beyond fp16 when multiplied."""
    outputs, target = oracle.example([(8, 8), (4, 4), (2, 2), (1, 1)])
    outputs, target = tensors([z * 0 + magnitude * np.sign(z) for z in outputs], target, device, dtype)
    loss = LoMixLoss(3, 4, backend=backend).to(device)
    exact = [z.detach().float().requires_grad_() for z in outputs]
    expected = loss.losses(exact, target)
    expected.sum().backward()
    for autocast in (False, True):
        for z in outputs:
            z.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            losses = loss.losses(outputs, target)
            total = loss(outputs, target)
        # nobody should, but it doesn't change the closed forms of lean
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast and backend == "lean"):
            losses.sum().backward()
        assert losses.dtype == total.dtype == torch.float32 and total.isfinite()
        assert torch.equal(losses, expected)
        for z, reference in zip(outputs, exact, strict=True):
            torch.testing.assert_close(z.grad, reference.grad.to(dtype))


def test_weights_and_losses_follow_the_order_of_the_maps():
    loss = LoMixLoss(3, 3, mixed_scales=2)
    assert loss.maps[0].name == "z_0"
    assert loss.weights().argmax() == 0
    assert len(loss.maps) == len(loss.weights()) == 3 + 4


def test_defaults_are_those_of_the_paper():
    assert DEFAULT_OPERATORS == ("add", "multiply", "concat", "fusion")
    assert len(LoMixLoss(2, 4).maps) == 48
    assert len(LoMixLoss(2, 7).maps) == 7 + 44  # only the four finest are mixed


def test_states_from_before_operators_had_their_name_are_loaded():
    first, second = (randomise(LoMixLoss(3, 2), seed) for seed in (0, 1))
    old = {key.replace("operators.", "mixers."): value for key, value in first.state_dict().items()}
    assert any(key.startswith("mixers.concat_0_1.") for key in old)
    second.load_state_dict(old)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["barrier", "softplus"])
def test_state_dict_restores_the_loss(rule):
    share = 0.0 if rule == "softplus" else 0.5
    outputs, target = tensors(*oracle.example([(8, 8), (4, 4)]), CPU, torch.float32)
    first, second = (randomise(LoMixLoss(3, 2, rule=rule, share=share), seed) for seed in (0, 1))
    assert first(outputs, target) != second(outputs, target)
    second.load_state_dict(first.state_dict())
    assert first(outputs, target) == second(outputs, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operators": ["add", "divide"]}, "divide"),
        ({"rule": "lucky"}, "lucky"),
        ({"backend": "quantum"}, "quantum"),
        ({"operators": ["add", "add"]}, "names each operator once"),
        ({"operators": "add"}, "must be a list"),
        ({"operators": ["original"]}, "unknown operator 'original'"),
        ({"mixed_scales": 4}, "mixed_scales"),
        ({"mixed_scales": 0}, "mixed_scales"),
        ({"num_scales": 1}, "1"),
        ({"num_classes": 1}, "at least 2 classes"),
        ({"num_classes": 0, "regions": True}, "1 region, got 0"),
        ({"share": 1.5}, "share"),
        ({"rule": "softplus", "share": 0.5}, "share"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        LoMixLoss(**{"num_classes": 3, "num_scales": 3, **change})


def images(*shapes):
    return [torch.zeros(2, *shape) for shape in shapes]


@pytest.mark.parametrize(
    ("outputs", "target", "message"),
    [
        (images((3, 8, 8)), (2, 1, 8, 8), "2 outputs, got 1"),
        (images((3, 8, 8), (3, 4, 4), (3, 2, 2)), (2, 1, 8, 8), "2 outputs, got 3"),
        (torch.zeros(2, 3, 8, 8), (2, 1, 8, 8), "single tensor"),
        (images((3, 8, 8), (2, 4, 4)), (2, 1, 8, 8), r"C = 3 .* got \(2, 2, 4, 4\)"),
        (images((3, 8, 8), (3, 4)), (2, 1, 8, 8), r"2 spatial axes.* got \(2, 3, 4\)"),
        # a batch of another size was broadcast, and the loss wrong
        (images((3, 8, 8), (3, 4, 4)), (1, 1, 8, 8), r"B = 1"),
        ([torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 4, 4)], (2, 1, 8, 8), r"B = 2"),
        (images((3, 8, 8), (3, 4, 4)), (2, 1, 4, 4), r"\(4, 4\), got \(8, 8\)"),
        (images((3, 8, 8), (3, 4, 4)), (2, 3, 8, 8), r"\(B, 1, .*got \(2, 3, 8, 8\)"),
        (images((3, 8), (3, 4)), (2, 1, 8), "2D or 3D"),
    ],
)
def test_wrong_inputs(outputs, target, message):
    with pytest.raises(ValueError, match=message):
        LoMixLoss(3, 2)(outputs, torch.zeros(target))


def test_a_target_of_regions_has_a_channel_for_ignored_pixels():
    loss = LoMixLoss(3, 2, regions=True, ignore_label=3)
    with pytest.raises(ValueError, match=r"\(B, 4, .* the last one for ignored pixels; got \(2, 3, 8, 8\)"):
        loss(images((3, 8, 8), (3, 4, 4)), torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("ignore_label", [None, 4])
@pytest.mark.parametrize("label", [-1, 3, 255])
def test_a_label_that_is_no_class(label, ignore_label):
    target = torch.zeros(2, 1, 8, 8)
    target[1, 0, 2, 3] = label
    with pytest.raises(ValueError, match=f"the label {label}, but the 3 classes are 0 to 2"):
        LoMixLoss(3, 2, ignore_label=ignore_label)(images((3, 8, 8), (3, 4, 4)), target)


def test_float64_outputs_need_float64_operators():
    outputs, target = [z.double() for z in images((3, 8, 8), (3, 4, 4))], torch.zeros(2, 1, 8, 8)
    loss = LoMixLoss(3, 2)
    with pytest.raises(ValueError, match=r"loss.double\(\)"):
        loss(outputs, target)
    assert loss.double()(outputs, target).dtype == torch.float64


@pytest.mark.parametrize(("ignore_label", "channels"), [(None, 3), (4, 4)])
def test_wrong_number_of_regions_in_the_target(ignore_label, channels):
    loss = LoMixLoss(3, 2, regions=True, ignore_label=ignore_label)
    with pytest.raises(ValueError, match=rf"\(B, {channels}, .*got \(2, 1"):
        loss(images((3, 8, 8), (3, 4, 4)), torch.zeros(2, 1, 8, 8))


class Annotated(torch.Tensor):
    """A subclass that does something else in some operations, as MONAI's MetaTensor does."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if kwargs and kwargs.get("out") is not None:
            raise TypeError(f"{function.__name__} has no out for {cls.__name__}")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("backend", ["plain", "lean"])
@pytest.mark.parametrize("sampled", [False, True])
def test_subclasses_of_tensors_have_the_same_loss(backend, sampled):
    values, gradients = [], []
    for kind in (torch.Tensor, Annotated):
        sampling = {"sampled_mutants": 4} if sampled else {}
        loss = (SamplingLoMixLoss if sampled else LoMixLoss)(3, 3, backend=backend, **sampling)
        arrays, target = tensors(*oracle.example([(8, 8), (4, 4), (2, 2)]), CPU, torch.float32)
        outputs = [z.detach().as_subclass(kind).requires_grad_() for z in arrays]
        for _ in range(2):
            value = loss(outputs, target.as_subclass(kind))
        value.backward()
        assert type(value) is torch.Tensor
        values.append(value)
        gradients.append([z.grad.as_subclass(torch.Tensor) for z in outputs])
    assert torch.equal(*values)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loss_converted_to_half_precision_is_refused(dtype):
    with pytest.raises(ValueError, match=f"converted to {dtype}, .*: convert the network alone"):
        LoMixLoss(3, 2).to(dtype)([z.to(dtype) for z in images((3, 8, 8), (3, 4, 4))], torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("backend", ["plain", "lean"])
def test_a_loss_in_double_precision_takes_outputs_in_single_precision(backend):
    arrays = oracle.example([(8, 8), (4, 4)])
    loss = LoMixLoss(3, 2, backend=backend).double()
    outputs, target = tensors(*arrays, CPU, torch.float32)
    got = loss.losses(outputs, target)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, loss.losses([z.double() for z in outputs], target), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("value", "regions", "message"),
    [
        (0.7, False, "the label 0.7, but the 3 classes are 0 to 2"),
        (255, True, "the value 255, but regions are 0 or 1"),
        (0.5, True, "the value 0.5, but regions are 0 or 1"),
        (float("nan"), False, "the label nan"),
    ],
)
def test_values_that_are_no_label_and_no_region(value, regions, message):
    target = torch.zeros(2, 3 if regions else 1, 8, 8)
    target[1, 0, 2, 3] = value
    with pytest.raises(ValueError, match=message):
        LoMixLoss(3, 2, regions=regions)(images((3, 8, 8), (3, 4, 4)), target)


def test_outputs_stacked_in_one_tensor():
    """MONAI's DynUNet gives copies of its coarse heads at full resolution, stacked."""
    outputs, target = tensors(*oracle.example([(8, 8)] * 3), CPU, torch.float32)
    loss = LoMixLoss(3, 3)
    torch.testing.assert_close(loss(torch.stack(outputs, 1), target), loss(outputs, target), rtol=0, atol=0)
    with pytest.raises(ValueError, match="3 outputs, got 2"):
        loss(torch.stack(outputs[:2], 1), target)


def test_labels_are_looked_at_before_the_anchor_sees_them():
    """On a GPU a wrong label would end the process within another loss, without a sentence."""

    class Anchor(torch.nn.Module):
        def forward(self, outputs, target):
            raise AssertionError("the anchor came first")

    loss = LoMixLoss(3, 2, anchor=Anchor())
    with pytest.raises(ValueError, match="7"):
        loss([torch.randn(1, 3, 8, 8), torch.randn(1, 3, 4, 4)], torch.full((1, 1, 8, 8), 7))


def test_a_share_out_of_range_is_refused_beside_an_anchor():
    with pytest.raises(ValueError, match="the share of the anchor must be between 0 and 1, got 1.2"):
        LoMixLoss(3, 2, share=1.2, anchor=torch.nn.Identity())
