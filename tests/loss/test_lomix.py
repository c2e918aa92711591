"""The whole loss against the oracle, over backends, strides, shapes, operators and dtypes."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from nnunet_lomix import LoMixLoss
from nnunet_lomix.loss import DEFAULT_OPERATORS, OPERATORS, RULES
from nnunet_lomix.loss.backends import plain

from . import oracle

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def randomise(loss, seed, step=1):
    """Random parameters, in the middle of a training."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in loss.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    loss.rule.steps.fill_(step)
    return loss


def tensors(outputs, target, device, dtype=torch.float64):
    outputs = [torch.from_numpy(z).to(device, dtype).requires_grad_() for z in outputs]
    return outputs, torch.from_numpy(target).to(device)


@st.composite
def cases(draw, operators=tuple(OPERATORS)):
    """Arguments of the loss, sizes of the outputs, batch size, seed and step; odd sizes, anisotropic strides."""
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
        "share": 0.0 if rule == "softplus" else draw(st.sampled_from([0.0, 0.4, 1.0])),
        "stride": draw(st.integers(1, 3)),
        "regions": regions,
        "ignore_label": classes if draw(st.booleans()) else None,
        "batch_dice": draw(st.booleans()),
        "paper_dice": draw(st.booleans()),
    }
    return arguments, sizes, draw(st.integers(1, 2)), draw(st.integers(0, 999)), draw(st.integers(1, 9))


def a_case(classes, *sizes, batch=2, step=1, **arguments):
    """A case of a table; the arguments that it doesn't name are the loss's own."""
    usual = {"operators": DEFAULT_OPERATORS, "rule": "barrier", "share": 0.4, "stride": 1}
    usual |= {"regions": False, "ignore_label": None, "batch_dice": False, "paper_dice": False}
    return usual | {"num_classes": classes, "num_scales": len(sizes)} | arguments, list(sizes), batch, 0, step


TABLE = {
    "2d": a_case(3, (5, 7), (3, 4), (2, 2), operators=("add", "multiply", "concat")),
    "2d, on a grid": a_case(3, (8, 8), (4, 4), (2, 2), stride=2, step=3),
    "ignore label, Dice of the batch": a_case(3, (5, 7), (3, 4), ignore_label=3, batch_dice=True),
    "ignore label, a grid that leaves the image": a_case(3, (5, 7), (3, 4), ignore_label=3, stride=2),
    "3d, regions": a_case(2, (3, 4, 2), (3, 2, 2), (1, 2, 1), regions=True, operators=("fusion",)),
    "3d, regions, on a grid": a_case(2, (4, 4, 2), (2, 2, 2), (1, 2, 1), regions=True, stride=2, step=2),
    "one region, ignored pixels": a_case(1, (5, 7), (3, 4), regions=True, ignore_label=1, stride=2),
    "the paper's Dice": a_case(3, (5, 7), (3, 4), (2, 2), ignore_label=3, paper_dice=True),
    "the paper's Dice, regions": a_case(2, (5, 7), (3, 4), regions=True, ignore_label=2, paper_dice=True, stride=2),
    "many classes": a_case(17, (2, 3), (1, 2), (1, 1), operators=("concat", "fusion")),
    "axes of size 1, no operator": a_case(4, (19, 1), (9, 1), operators=(), stride=2),
    "strides of 1 and 3": a_case(2, (6, 7, 2), (2, 7, 2), (2, 3, 1), operators=("add",), stride=2),
    "some scales aren't mixed": a_case(2, (8, 6), (4, 6), (2, 3), (1, 1), mixed_scales=2, operators=("fusion",)),
    "a single sample, free weights": a_case(3, (8, 8), (4, 4), batch=1, rule="softplus", share=0.0, stride=2),
}
FIVE_SCALES = a_case(
    3, (3, 6, 5), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), mixed_scales=5, ignore_label=3, batch_dice=True
)  # 109 maps


def build(case, backend, device, dtype=torch.float64):
    """The loss of a case with random parameters, and the outputs and the target as arrays."""
    arguments, sizes, batch, seed, step = case
    loss = randomise(LoMixLoss(**arguments, backend=backend), seed, step).to(device, dtype)
    regions, ignore = arguments["regions"], arguments["ignore_label"] is not None
    classes = arguments["num_classes"]
    return loss, *oracle.example(sizes, batch=batch, classes=classes, regions=regions, ignore=ignore, seed=seed)


def oracle_loss(arguments, z, target):
    """That of one map."""
    ignore = arguments["ignore_label"]
    dice = {name: arguments[name] for name in ("batch_dice", "paper_dice")}
    if arguments["regions"]:
        return oracle.region_loss(z, target, ignore=ignore is not None, **dice)
    return oracle.class_loss(z, target, ignore=ignore, **dice)


def oracle_losses(loss, case, outputs, target):
    """The loss of each map on the grid of the step, map after map, and that of the anchor on all pixels."""
    arguments, sizes, _, _, step = case
    anchor = oracle_loss(arguments, outputs[0], target)
    full = [oracle.resample(z, sizes[0]) for z in outputs]
    *scales, target = (oracle.on_grid(image, sizes[1], arguments["stride"], step) for image in (*full, target))
    losses = []
    for map_ in loss.maps:
        operator = loss.operators[map_.operator]
        parameters = {k: v.detach().double().cpu().numpy() for k, v in operator.named_parameters()}
        number = operator.subsets.index(map_.scales)
        own = [scales[j] for j in map_.scales]
        mixed = oracle.map_logits(map_.operator, own, parameters, number, map_.scales)
        losses.append(oracle_loss(arguments, mixed, target))
    return np.array(losses), anchor


def assert_equals_the_oracle(case, device):
    arguments, *_ = case
    loss, outputs, target = build(case, "plain", device)
    expected, anchor = oracle_losses(loss, case, outputs, target)
    theta = getattr(loss.rule, "theta", torch.zeros(len(expected))).detach().cpu().numpy()
    weights = oracle.weights_of_maps(arguments["rule"], theta)
    total = arguments["share"] * anchor + (1 - arguments["share"]) * weights @ expected

    outputs, target = tensors(outputs, target, device)
    np.testing.assert_allclose(loss.losses(outputs, target).detach().cpu(), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(loss.weights().cpu(), weights, rtol=1e-9)
    got = loss(outputs, [target, None]).item()  # nnU-Net gives a list of targets
    np.testing.assert_allclose(got, total, rtol=1e-9, atol=1e-12 * weights.sum())


@pytest.mark.parametrize("name", TABLE)
def test_a_table_of_cases_equals_the_oracle(name, device):
    """The other backends equal plain in these cases: backends/test_fused.py."""
    assert_equals_the_oracle(TABLE[name], device)


@settings(max_examples=80, derandomize=True)
@example(case=FIVE_SCALES)
@given(case=cases())
def test_losses_weights_and_total_equal_the_oracle(device, case):
    assert_equals_the_oracle(case, device)


# a row at a time, and some rows
@pytest.mark.parametrize("values", [1, 100])
@settings(max_examples=20, derandomize=True)
@example(case=FIVE_SCALES)
@given(case=cases())
def test_slabs_of_any_size_give_the_same(values, device, case):
    gradients = []
    for most_values in (10**9, 0):
        loss, *arrays = build(case, "plain", device)
        outputs, target = tensors(*arrays, device)
        with mock.patch.multiple(plain, MOST_VALUES=most_values, VALUES_OF_CPU=values):
            loss(outputs, target).backward()
        gradients.append({str(i): z.grad for i, z in enumerate(outputs)})
        gradients[-1].update({k: p.grad for k, p in loss.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("sizes", [[(3, 4), (2, 2)], [(1, 3, 2), (1, 2, 1)]])
def test_gradcheck(sizes, regions, stride, device):
    loss = LoMixLoss(2, 2, regions=regions, ignore_label=2, stride=stride, rule="equal").double()
    loss = randomise(loss, 0).to(device)
    outputs, target = tensors(*oracle.example(sizes, batch=1, classes=2, regions=regions, ignore=True), device)
    # gradcheck moves the tensors in place, so the module sees its own parameters move; its steps are all the first one
    loss.observe = lambda losses: None
    parameters = list(loss.operators.parameters())
    assert gradcheck(lambda *_: loss.losses(outputs, target), [*outputs, *parameters])
    assert gradcheck(lambda *_: loss(outputs, target), outputs)


LAYOUTS = {
    "channels last": lambda z: z.to(memory_format=torch.channels_last if z.ndim == 4 else torch.channels_last_3d),
    "axes in another order": lambda z: z.mT.contiguous().mT,
    "every other value": lambda z: z.repeat_interleave(2, -1)[..., ::2],
    "a part of more channels": lambda z: torch.cat([z, z], 1)[:, : z.shape[1]],
}


@pytest.mark.parametrize("sizes", [[(5, 4), (3, 2), (2, 2)], [(3, 4, 5), (3, 2, 3), (1, 2, 2)]])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_in_memory_does_not_matter(layout, sizes, device):
    loss = randomise(LoMixLoss(3, 3, ignore_label=3, stride=2).double(), 0).to(device)
    arrays = oracle.example(sizes, ignore=True)
    results = []
    for arrange in (torch.clone, LAYOUTS[layout]):
        outputs, target = tensors(*arrays, device)
        arranged = [arrange(z) for z in outputs]
        assert arrange is torch.clone or not any(z.is_contiguous() for z in arranged)
        loss.zero_grad()
        loss.rule.steps.fill_(1)
        loss(arranged, arrange(target)).backward()
        results.append([z.grad for z in outputs] + [p.grad for p in loss.parameters()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


# torch.compile can't look into the kernels of fused
@pytest.mark.parametrize(("backend", "stride"), [(None, 2), ("fused", 1)])
def test_a_small_loss_is_one_graph_for_torch_compile_whatever_the_step(backend, stride):
    loss = LoMixLoss(3, 2, stride=stride, backend=backend)
    outputs, target = tensors(*oracle.example([(8, 8), (4, 4)]), CPU, torch.float32)
    compiled = torch.compile(loss.losses, backend="eager", fullgraph=True)
    for step in range(3):
        loss.rule.steps.fill_(step)
        torch.testing.assert_close(compiled(outputs, target), loss.losses(outputs, target))


def test_no_random_numbers_are_drawn():
    """So a training has the same random state with and without the loss."""
    state = torch.get_rng_state()
    loss = LoMixLoss(3, 3, operators=list(OPERATORS))
    outputs, target = tensors(*oracle.example([(8, 8), (4, 4), (2, 2)]), CPU, torch.float32)
    loss(outputs, target).backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1, 40])
def test_half_precision_outputs_are_computed_in_fp32(magnitude, dtype, device):
    """Under autocast or not; four logits of 40 are beyond fp16 when multiplied."""
    outputs, target = oracle.example([(8, 8), (4, 4), (2, 2), (1, 1)])
    outputs, target = tensors([magnitude * np.sign(z) for z in outputs], target, device, dtype)
    loss = LoMixLoss(3, 4).to(device)
    exact = [z.detach().float().requires_grad_() for z in outputs]
    expected = loss.losses(exact, target)
    expected.sum().backward()
    for autocast in (False, True):
        for z in outputs:
            z.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            losses = loss.losses(outputs, target)
            total = loss(outputs, target)
        losses.sum().backward()
        assert losses.dtype == total.dtype == torch.float32 and total.isfinite()
        assert torch.equal(losses, expected)
        for z, reference in zip(outputs, exact, strict=True):
            torch.testing.assert_close(z.grad, reference.grad.to(dtype))


def test_defaults_are_those_of_the_paper():
    assert DEFAULT_OPERATORS == ("add", "multiply", "concat", "fusion")
    assert len(LoMixLoss(2, 4).maps) == 48
    assert len(LoMixLoss(2, 7).maps) == 7 + 44  # only the four finest are mixed


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
        ({"operators": ["add", "divide"]}, "unknown operator 'divide'; choose from: add"),
        ({"rule": "lucky"}, "lucky"),
        ({"backend": "quantum"}, "quantum"),
        ({"operators": ["add", "add"]}, "names each operator once"),
        ({"operators": "add"}, "must be a list"),
        ({"mixed_scales": 4}, "mixed_scales"),
        ({"mixed_scales": 0}, "mixed_scales"),
        ({"num_scales": 1}, "1"),
        ({"num_classes": 1}, "at least 2 classes"),
        ({"num_classes": 0, "regions": True}, "1 region, got 0"),
        ({"share": float("nan"), "anchor": torch.nn.Identity()}, "share of the anchor"),
        ({"rule": "softplus"}, "free weights.*set share = 0"),
        ({"anchor": "z_0"}, "the anchor must be None, for z_0, or a module .*, got 'z_0'"),
        ({"share": "x"}, "share of the anchor must be between 0 and 1, got x"),
        ({"stride": 0}, "stride of the grid must be a whole number from 1 to 8, got 0"),
        ({"stride": 9}, "from 1 to 8, got 9"),
        ({"stride": 2.5}, "whole number from 1 to 8, got 2.5"),
        ({"stride": "2"}, "got '2'"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        LoMixLoss(**{"num_classes": 3, "num_scales": 3, **change})


def images(*shapes):
    return [torch.zeros(2, *shape) for shape in shapes]


TWO = images((3, 8, 8), (3, 4, 4))
MASKS = {"regions": True, "ignore_label": 3}


@pytest.mark.parametrize(
    ("outputs", "target", "arguments", "message"),
    [
        (images((3, 8, 8)), (2, 1, 8, 8), {}, "2 outputs, got 1"),
        (images((3, 8, 8)), (2, 1, 8, 8), {"share": 1}, "expected a list of 2 outputs"),
        (torch.zeros(2, 3, 8, 8), (2, 1, 8, 8), {}, "single tensor"),
        (torch.zeros(2, 3, 3, 8, 8), (2, 1, 8, 8), {}, "2 outputs, got 3"),
        (images((3, 8, 8), (2, 4, 4)), (2, 1, 8, 8), {}, r"C = 3 .* got \(2, 2, 4, 4\)"),
        (images((3, 8, 8), (3, 4)), (2, 1, 8, 8), {}, r"2 spatial axes.* got \(2, 3, 4\)"),
        # a batch of another size was broadcast, and the loss wrong
        (TWO, (1, 1, 8, 8), {}, r"B = 1"),
        ([torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 4, 4)], (2, 1, 8, 8), {}, r"B = 2"),
        (TWO, (2, 1, 4, 4), {}, r"\(4, 4\), got \(8, 8\)"),
        (TWO, (2, 3, 8, 8), {}, r"\(B, 1, .*got \(2, 3, 8, 8\); if it is one-hot, give"),
        (TWO, (2, 1, 8, 8), {"regions": True}, r"\(B, 3, "),
        (TWO, (2, 3, 8, 8), MASKS, r"\(B, 4, .* the last one for ignored pixels; got \(2, 3, 8, 8\)"),
        # as MONAI's DynUNet gives them, and labels without their channel
        (torch.zeros(2, 2, 3, 8, 8), (2, 8, 8), {}, r"must be \(B, 1, \*spatial\), 2D or 3D; got \(2, 8, 8\)$"),
        (images((3, 8), (3, 4)), (2, 1, 8), {}, "2D or 3D"),
        ([z.double() for z in TWO], (2, 1, 8, 8), {}, r"loss.double\(\)"),
    ],
)
def test_wrong_inputs(outputs, target, arguments, message):
    with pytest.raises(ValueError, match=message):
        LoMixLoss(3, 2, **arguments)(outputs, torch.zeros(target))


def test_a_stride_without_effect_is_a_warning_once(caplog):
    """Outputs that are all of full size, as DynUNet stacks them."""
    loss = LoMixLoss(3, 2, stride=2)
    for _ in range(2):
        loss(images((3, 8, 8), (3, 8, 8)), torch.zeros(2, 1, 8, 8))
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "stride = 2 has no effect" in record.getMessage()
    caplog.clear()
    LoMixLoss(3, 2, stride=3)(images((3, 2, 8), (3, 1, 8)), torch.zeros(2, 1, 2, 8))  # an axis shorter than the stride
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("value", "arguments", "message"),
    [
        (-1, {}, "the label -1, but the 3 classes are 0 to 2"),
        (3, {"ignore_label": 4}, "the label 3, but the 3 classes are 0 to 2"),
        (255, {"ignore_label": 4}, "the label 255, but the 3 classes are 0 to 2"),
        (0.7, {}, "the label 0.7, but the 3 classes are 0 to 2"),
        (float("nan"), {}, "the label nan"),
        (255, {"regions": True}, "the value 255, but regions are 0 or 1"),
        (0.5, {"regions": True}, "the value 0.5, but regions are 0 or 1"),
    ],
)
def test_values_that_are_no_label_and_no_region(value, arguments, message):
    target = torch.zeros(2, 3 if arguments.get("regions") else 1, 8, 8)
    target[1, 0, 2, 3] = value
    with pytest.raises(ValueError, match=message):
        LoMixLoss(3, 2, **arguments)(TWO, target)


class Annotated(torch.Tensor):
    """A subclass that does something else in some operations, as MONAI's MetaTensor does."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if kwargs and kwargs.get("out") is not None:
            raise TypeError(f"{function.__name__} has no out for {cls.__name__}")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_subclasses_of_tensors_have_the_same_loss():
    results = []
    for kind in (torch.Tensor, Annotated):
        loss = LoMixLoss(3, 3, stride=2)
        arrays, target = tensors(*oracle.example([(8, 8), (4, 4), (2, 2)]), CPU, torch.float32)
        outputs = [z.detach().as_subclass(kind).requires_grad_() for z in arrays]
        for _ in range(2):
            value = loss(outputs, target.as_subclass(kind))
        value.backward()
        assert type(value) is torch.Tensor
        results.append([value, *(z.grad.as_subclass(torch.Tensor) for z in outputs)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loss_converted_to_half_precision_is_refused(dtype):
    with pytest.raises(ValueError, match=rf"the loss is in {dtype}, .*: call loss.float\(\), and convert the network"):
        LoMixLoss(3, 2).to(dtype)([z.to(dtype) for z in TWO], torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("rule", ["barrier", "equal"])
@pytest.mark.parametrize("operators", [(), ("add",)])
def test_operators_without_parameters_compute_in_double_precision_what_is_given_in_it(operators, rule):
    outputs, target = tensors(*oracle.example([(8, 8), (4, 4)]), CPU)
    value = LoMixLoss(3, 2, operators, rule=rule)(outputs, target)
    value.backward()
    torch.testing.assert_close(value, LoMixLoss(3, 2, operators, rule=rule).double()(outputs, target))


def test_a_loss_in_double_precision_takes_outputs_in_single_precision():
    arrays = oracle.example([(8, 8), (4, 4)])
    loss = LoMixLoss(3, 2).double()
    outputs, target = tensors(*arrays, CPU, torch.float32)
    got = loss.losses(outputs, target)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, loss.losses([z.double() for z in outputs], target), rtol=1e-12, atol=0)


def test_outputs_stacked_in_one_tensor():
    """MONAI's DynUNet gives copies of its coarse heads at full resolution, stacked."""
    outputs, target = tensors(*oracle.example([(8, 8)] * 3), CPU, torch.float32)
    loss = LoMixLoss(3, 3)
    torch.testing.assert_close(loss(torch.stack(outputs, 1), target), loss(outputs, target), rtol=0, atol=0)


def test_labels_are_looked_at_before_the_anchor_sees_them():
    """On a GPU a wrong label would end the process within another loss, without a sentence."""

    class Anchor(torch.nn.Module):
        def forward(self, outputs, target):
            raise AssertionError("the anchor came first")

    loss = LoMixLoss(3, 2, anchor=Anchor())
    with pytest.raises(ValueError, match="7"):
        loss([torch.randn(1, 3, 8, 8), torch.randn(1, 3, 4, 4)], torch.full((1, 1, 8, 8), 7))


@pytest.mark.parametrize("stride", [1, 2])
def test_share_of_an_anchor(stride):
    """share · A + (1 − share) · Σ w L, where the anchor sees what the loss was given."""

    class Anchor(torch.nn.Module):
        def forward(self, outputs, targets):
            return outputs[1].square().sum() + 0 * targets[1].sum()

    outputs, target = tensors(*oracle.example([(8, 8), (4, 4)]), CPU)
    loss = LoMixLoss(3, 2, rule="equal", share=0.3, anchor=Anchor(), stride=stride).double()
    expected = 0.3 * outputs[1].square().sum() + 0.7 * loss.losses(outputs, target).mean()
    torch.testing.assert_close(loss(outputs, [target, target]), expected)
    loss.share = 1
    assert loss(outputs, [target, target]) == outputs[1].square().sum() and loss.rule.steps == 1


def test_losses_are_remembered_with_the_names_of_those_that_are_not_finite():
    loss = LoMixLoss(3, 2)
    assert loss.maps_not_finite() == []
    outputs, target = tensors(*oracle.example([(8, 8), (4, 4)]), CPU, torch.float32)
    losses = loss.losses(outputs, target)
    assert torch.equal(loss.last_losses, losses) and not loss.last_losses.requires_grad
    with torch.no_grad():
        outputs[1][0, 0, 0, 0] = torch.nan
    loss(outputs, target)
    assert loss.maps_not_finite() == [m.name for m in loss.maps if 1 in m.scales]
