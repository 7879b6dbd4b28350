"""Gradients of networks that keep packed sources: those of autograd, or of fake quantisation."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedcunet.models import DUNet, IterativeRefinement, StackedHourglass
from fedcunet.quant import QuantSpec, pieces, quantise_network
from fedcunet.quant.outputs import GradientQuantiser
from fedcunet.quant.storage import store
from fedcunet.training.local import freeze_norms
from tests.made_networks import batch, gradients, network, worst_difference


@pytest.mark.parametrize(
    ("unets", "order", "shape"),
    [
        (1, 0, (3, 64, 64)),
        (2, 0, (4, 64, 64)),
        (3, 2, (2, 128, 64)),
        (2, 1, (1, 64, 192)),
        (2, 1, (2, 320, 64)),
    ],
)
def test_gradients_are_those_of_plain_autograd(
    unets: int, order: int, shape: tuple[int, int, int]
) -> None:
    plain = network(QuantSpec(), unets=unets, order=order)
    stored = store(copy.deepcopy(plain))
    image, target = batch(*shape)
    found = gradients(stored, image, target)
    assert worst_difference(found, gradients(plain, image, target)) < 1e-10
    for mine, theirs in zip(stored.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(weight_bits=1, alpha=True),
        QuantSpec(input_bits=8, weight_bits=2, input_quantizer="ranged"),
        QuantSpec(input_bits=4, input_quantizer="paper"),
        QuantSpec(input_bits=8, weight_bits=1, alpha=True, input_quantizer="source"),
        QuantSpec(input_bits=4, weight_bits=2, input_quantizer="source"),
        QuantSpec(weight_bits=1, alpha=True, weight_share=0.25),
        QuantSpec(input_bits=8, weight_bits=2, input_quantizer="source", weight_share=0.75),
    ],
    ids=lambda spec: f"{spec.name} {spec.input_quantizer} {spec.weight_share}",
)
def test_quantised_gradients_are_those_of_fake_quantisation(spec: QuantSpec) -> None:
    plain = network(spec)
    stored = store(copy.deepcopy(plain))
    image, target = batch(4)
    with torch.no_grad():
        plain.unets[0].neck.grow.conv.weight[0] *= 20  # some latent weights outside [-1, 1]
        stored.unets[0].neck.grow.conv.weight[0] *= 20
    found = gradients(stored, image, target)
    assert worst_difference(found, gradients(plain, image, target)) < 1e-10


@pytest.mark.parametrize("kind", ["dunet", "stacked", "refinement"])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_norms_in_evaluation_mode_have_the_gradients_of_plain_autograd(
    kind: str, all_of_them: bool
) -> None:
    spec = QuantSpec(input_bits=8, weight_bits=1, alpha=True, input_quantizer="source")
    plain = network(spec) if kind == "dunet" else small_network(kind, spec).double().train()
    image, target = batch(2)
    plain(image)  # statistics that differ from those of a new network
    if all_of_them:
        freeze_norms(plain)
        image, target = image[:1], target[:1]  # of which BatchNorm could not tell a variance
    else:
        next(each for each in plain.modules() if isinstance(each, nn.BatchNorm2d)).eval()
    stored = store(copy.deepcopy(plain), frugal=all_of_them)
    found = gradients(stored, image, target)
    worst = worst_difference(found, gradients(plain, image, target))
    assert worst < (1e-10 if kind == "dunet" else 1e-9)
    for mine, theirs in zip(stored.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_values", [2**9, 2**13])
def test_the_size_of_the_work_space_does_not_change_the_gradients(
    monkeypatch: pytest.MonkeyPatch, chunk_values: int
) -> None:
    model = network(QuantSpec(input_bits=8, input_quantizer="source"))
    image, target = batch(2)
    expected = gradients(store(copy.deepcopy(model)), image, target)
    monkeypatch.setattr(pieces, "CHUNK_VALUES", chunk_values)
    found = gradients(store(model), image, target)
    assert worst_difference(found, expected) < 1e-10


@pytest.mark.parametrize("gradient_scale", ["channel", "tensor"])
def test_gradients_at_16_bits_are_nearly_those_in_full(gradient_scale: str) -> None:
    spec = QuantSpec(gradient_bits=16, gradient_scale=gradient_scale)
    image, target = batch(4)
    found = gradients(store(network(spec)), image, target)
    expected = gradients(store(network(QuantSpec())), image, target)
    # A step is 2^-15 of the range; one scale for a tensor leaves less of it for small values.
    difference = worst_difference(found, expected)
    assert 0 < difference < (0.003 if gradient_scale == "channel" else 0.3)


def test_a_head_without_loss_has_the_gradients_of_plain_autograd() -> None:
    plain = network(QuantSpec())
    stored = store(copy.deepcopy(plain))
    image, _ = batch(2)
    for model in (plain, stored):
        model(image)[0].square().sum().backward()
    unread = "unets.1.up.0.adapt.conv.weight"
    assert not dict(stored.named_parameters())[unread].grad.any()
    found = stored.stem.conv.weight.grad
    assert float((found - plain.stem.conv.weight.grad).norm() / found.norm()) < 1e-10


def test_one_scale_for_a_tensor_is_that_of_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    largest: dict[GradientQuantiser, float] = {}

    class Watched(GradientQuantiser):
        def __call__(self, gradient: Tensor) -> Tensor:
            largest[self] = max(largest.get(self, 0), float(gradient.abs().max()))
            return super().__call__(gradient)

    monkeypatch.setattr("fedcunet.quant.engine.GradientQuantiser", Watched)
    spec = QuantSpec(input_bits=8, gradient_bits=8, gradient_scale="tensor")
    gradients(store(network(spec)), *batch(3))
    scaled = [each for each in largest if each.peak is not None]
    assert len(scaled) > 20
    assert all(largest[each] == float(each.peak) for each in scaled)


def small_network(kind: str, spec: QuantSpec) -> nn.Module:
    """One of the three networks, one with heads of both kinds."""
    torch.manual_seed(3)
    model: nn.Module
    if kind == "stacked":
        model = StackedHourglass(2, 3, width=8, num_supervisions=1)
    elif kind == "stacked detection":
        model = StackedHourglass(2, 3, width=8, supervision="detection")
    elif kind == "refined hourglass":
        model = IterativeRefinement(StackedHourglass(1, 3, width=8))
    else:
        dunet = DUNet(2, 1, 3, width=8, growth=4, supervision="detection")
        model = IterativeRefinement(dunet)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -0.5, 1.5)
    return quantise_network(model.double().train(), spec)


@pytest.mark.parametrize("frugal", [False, True])
@pytest.mark.parametrize(
    "spec",
    [QuantSpec(), QuantSpec(input_bits=8, weight_bits=1, alpha=True, input_quantizer="source")],
    ids=lambda spec: spec.name,
)
@pytest.mark.parametrize(
    "kind", ["stacked", "stacked detection", "refined hourglass", "refined DU-Net"]
)
def test_every_network_has_the_gradients_of_plain_autograd(
    kind: str, spec: QuantSpec, frugal: bool
) -> None:
    plain = small_network(kind, spec)
    stored = store(copy.deepcopy(plain), frugal=frugal)
    # With another seed a sum lies half between two codes, and may go either way.
    image, target = batch(2, seed=4)
    found = gradients(stored, image, target)
    # Two passes through an hourglass whose stem has two channels lose a digit more.
    assert worst_difference(found, gradients(plain, image, target)) < 1e-9
    for mine, theirs in zip(stored.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@given(
    unets=st.integers(1, 3),
    order=st.integers(0, 2),
    supervisions=st.integers(1, 3),
    bits=st.sampled_from([4, 5, 6, 8, 11, 32]),
    size=st.integers(2, 3),
    # At 64 by 64 the neck is one pixel: BatchNorm of two values magnifies the last digit.
    sides=st.tuples(st.sampled_from([128, 192]), st.sampled_from([64, 128])),
    frugal=st.booleans(),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_du_net_has_the_gradients_of_plain_autograd(
    unets: int,
    order: int,
    supervisions: int,
    bits: int,
    size: int,
    sides: tuple[int, int],
    frugal: bool,
) -> None:
    torch.manual_seed(4)
    model = DUNet(
        unets,
        min(order, unets - 1),
        2,
        num_supervisions=min(supervisions, unets),
        width=5,
        growth=3,
    )
    plain = quantise_network(
        model.double().train(), QuantSpec(input_bits=bits, input_quantizer="source")
    )
    stored = store(copy.deepcopy(plain), frugal=frugal)
    image, _ = batch(size, *sides)
    target = torch.zeros((), dtype=torch.float64)
    found = gradients(stored, image, target)
    # Networks this small, BatchNorm over so few values, lose two digits against those chosen above.
    assert worst_difference(found, gradients(plain, image, target)) < 1e-8


@pytest.mark.parametrize("bits", [8, 32])
def test_computing_sources_again_changes_no_bit_of_the_gradients(bits: int) -> None:
    spec = QuantSpec(input_bits=bits, weight_bits=1, alpha=True, input_quantizer="source")
    model = network(spec).float()
    image, target = (tensor.float() for tensor in batch(2))
    found, expected = (
        gradients(store(copy.deepcopy(model), frugal=frugal), image, target)
        for frugal in (True, False)
    )
    assert all(found[name].equal(expected[name]) for name in expected)
