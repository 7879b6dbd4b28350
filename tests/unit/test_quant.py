"""Quantisers: values by hand, straight-through gradients, unbiased rounding."""

import copy

import pytest
import torch
from torch import nn

from fedcunet.models import DUNet
from fedcunet.quant import QuantConv2d, QuantSpec, quantise_network, seed_rounding
from fedcunet.quant.functions import (
    QuantiseInput,
    QuantiseWeight,
    binarise,
    quantise_gradient,
    quantise_weight,
    ternarise,
)
from fedcunet.quant.layers import (
    clamp_latent_weights,
    quantised_weights,
    weights_on_their_way,
)
from fedcunet.quant.outputs import GradientQuantiser
from fedcunet.quant.rounding import Rounding

SPEC_818 = QuantSpec(input_bits=8, weight_bits=1, gradient_bits=8, alpha=True)


def filters(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)[:, :, None, None]


def test_binary_weights_are_signs_with_zero_positive_and_alpha_the_mean_magnitude() -> None:
    weight = filters([0.5, -0.25, 0.0, -0.25])
    assert binarise(weight, scaled=False).flatten().tolist() == [1, -1, 1, -1]
    assert binarise(weight, scaled=True).flatten().tolist() == [0.25, -0.25, 0.25, -0.25]


def test_ternary_weights_have_the_threshold_of_each_filter() -> None:
    # mean|w| = 0.25, threshold 0.175; the second filter is four times the first.
    weight = filters([0.5, -0.2, 0.1, -0.2], [2.0, -0.8, 0.4, -0.8])
    assert ternarise(weight, scaled=False).flatten(1).tolist() == [[1, -1, 0, -1]] * 2
    assert ternarise(weight, scaled=True).flatten(1).tolist() == [
        pytest.approx([0.3, -0.3, 0, -0.3]),
        pytest.approx([1.2, -1.2, 0, -1.2]),
    ]
    assert ternarise(filters([0.0, 0.0]), scaled=True).flatten().tolist() == [0, 0]


def test_weights_on_their_way_lie_between_latent_and_quantised_ones() -> None:
    weight = filters([0.5, -0.25, 0.0, -0.25], [0.0, 0.0, 0.0, 0.0])
    halfway = quantise_weight(weight, 1, scaled=True, share=0.5)
    assert halfway[0].flatten().tolist() == [0.375, -0.25, 0.125, -0.25]
    assert quantise_weight(weight, 1, scaled=True, share=0.0).equal(weight)
    assert quantise_weight(weight, 1, scaled=True, share=1.0).equal(binarise(weight, scaled=True))
    # Unscaled codes are 4 times the filter's mean magnitude, and the latent weights are made so.
    halfway = quantise_weight(weight, 1, scaled=False, share=0.5)
    assert halfway[0].flatten().tolist() == [1.5, -1.0, 0.5, -1.0]
    assert halfway.isfinite().all()
    # The weights beyond the ternary threshold have a mean magnitude of 0.3.
    weight = filters([0.5, -0.2, 0.1, -0.2])
    start = quantise_weight(weight, 2, scaled=False, share=0.0)
    assert start.flatten().tolist() == pytest.approx([0.5 / 0.3, -0.2 / 0.3, 0.1 / 0.3, -0.2 / 0.3])


def test_a_network_has_its_weights_on_their_way_only_inside() -> None:
    floats = DUNet(1, 0, 3, width=16, growth=8).eval()
    spec = QuantSpec(weight_bits=1, alpha=True)
    model = quantise_network(copy.deepcopy(floats), spec)
    image = torch.rand(1, 3, 64, 64)
    binary = model(image)[0]

    def use_and_fail() -> None:
        with weights_on_their_way(model, 0.0):
            assert model(image)[0].equal(floats(image)[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use_and_fail()
    assert not binary.allclose(floats(image)[0])
    assert model(image)[0].equal(binary)


def test_weight_gradient_passes_inside_and_stops_outside_one() -> None:
    weight = filters([0.5, -1.0, 1.5, -2.0]).requires_grad_()
    QuantiseWeight.apply(weight, 1, False, 1.0).sum().backward()
    assert weight.grad.flatten().tolist() == [1, 1, 0, 0]


def test_input_quantiser_is_equation_6_over_its_range() -> None:
    x = torch.tensor([0.0, 0.3, 0.9, 1.2, 3.9, 5.0], requires_grad=True)
    paper = QuantiseInput.apply(x, 3, 1.0)  # step 1/4, limit 3/4
    assert paper.tolist() == [0, 0.25, 0.75, 0.75, 0.75, 0.75]
    paper.sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 0, 0, 0]
    x.grad = None
    ranged = QuantiseInput.apply(x, 3, 4.0)  # step 1, limit 3
    assert ranged.tolist() == [0, 0, 1, 1, 3, 3]
    ranged.sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_gradients_are_unbiased_and_on_their_grid(bits: int, per_channel: bool) -> None:
    gradient = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    gradient[:, 0] *= 1e-4
    gradient[0, 2] = 0
    generator = torch.Generator().manual_seed(2)
    draws = torch.stack(
        [
            quantise_gradient(gradient, bits, per_channel=per_channel, generator=generator)
            for _ in range(600)
        ]
    )
    peak = gradient.abs().amax(dim=(2, 3), keepdim=True) if per_channel else gradient.abs().max()
    # The scale is at most twice what is needed, so a step at most 2 peak / (2^(k-1) - 1).
    step = 2 * peak / (2 ** (bits - 1) - 1)
    assert ((draws - gradient).abs() <= step + 1e-12).all()
    # Rounding has a standard error of at most step / 2; the bytes bias it by step / 512 at most.
    allowed = step * (6 * 0.5 / 600**0.5 + 1 / 512) + 1e-12
    assert ((draws.mean(0) - gradient).abs() <= allowed).all()
    for sample in range(2):
        for channel in range(3):
            assert draws[0, sample, channel].unique().numel() <= 2**bits


def test_gradient_rounding_depends_on_the_generator_alone() -> None:
    gradient = torch.randn(1, 2, 4, 4)
    first, second, other = (
        quantise_gradient(gradient, 4, per_channel=True, generator=torch.Generator().manual_seed(s))
        for s in (5, 5, 6)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("largest", [1e-33, 1e-37, 1e-45])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_gradients_of_next_to_nothing_stay_finite(largest: float, bits: int) -> None:
    gradient = torch.zeros(1, 2, 4, 4)
    gradient[0, 0, 1, 2] = largest
    gradient[0, 1] = 1.0
    rounding = torch.Generator().manual_seed(1)
    found = quantise_gradient(gradient, bits, per_channel=True, generator=rounding)
    assert found.isfinite().all()
    assert found[0, 0].abs().max() < 1e-30
    assert found[0, 1].mean() > 0.5
    quantise = GradientQuantiser(bits, Rounding())
    step = quantise(gradient.movedim(1, 3).contiguous())
    assert step.isfinite().all()
    assert step[..., 0].abs().max() < 1e-30
    assert step[..., 1].mean() > 0.5


def test_all_convolutions_but_the_first_and_the_heads_are_quantised() -> None:
    model = quantise_network(DUNet(2, 1, 5, width=16, growth=4), SPEC_818)
    plain = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and not isinstance(module, QuantConv2d)
    ]
    assert sorted(plain) == ["heads.0.conv", "heads.1.conv", "stem.conv"]


def test_names_and_values_of_the_state_do_not_change_by_quantising() -> None:
    torch.manual_seed(0)
    plain = DUNet(2, 1, 5, width=16, growth=4)
    torch.manual_seed(0)
    quantised = quantise_network(DUNet(2, 1, 5, width=16, growth=4), SPEC_818)
    assert list(plain.state_dict()) == list(quantised.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, quantised.state_dict()[name]), name


def test_the_float_setting_changes_nothing() -> None:
    model = quantise_network(DUNet(1, 0, 3, width=8, growth=4), QuantSpec())
    assert not any(isinstance(module, QuantConv2d) for module in model.modules())


def test_a_quantised_step_repeats_with_its_seed() -> None:
    model = quantise_network(DUNet(2, 1, 5, width=16, growth=4), SPEC_818)
    image = torch.rand(2, 3, 64, 64)

    def gradient(seed: int) -> torch.Tensor:
        seed_rounding(model, seed)
        model.zero_grad()
        model(image)[-1].square().mean().backward()
        return model.unets[0].neck.grow.conv.weight.grad.clone()

    assert torch.equal(gradient(1), gradient(1))
    assert not torch.equal(gradient(1), gradient(2))


def test_hidden_convolutions_see_only_grid_inputs_and_binary_weights() -> None:
    spec = QuantSpec(input_bits=4, weight_bits=1, gradient_bits=8, input_quantizer="ranged")
    conv = QuantConv2d.from_float(nn.Conv2d(2, 3, 1, bias=False), spec, rounding=None)
    with torch.no_grad():
        output = conv(torch.full((1, 2, 1, 1), 0.8))
    # 0.8 lies nearest to 1.0 on the grid of 4 bits over [-4, 4] (step 0.5): sums of +-1 * 1.0.
    assert set(output.flatten().tolist()) <= {-2.0, 0.0, 2.0}


def test_latent_weights_are_clamped_and_float_ones_are_not() -> None:
    model = quantise_network(DUNet(1, 0, 3, width=8, growth=4), SPEC_818)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    clamp_latent_weights(quantised_weights(model))
    assert model.unets[0].neck.grow.conv.weight.max() == 1
    assert model.stem.conv.weight.max() == 3


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (QuantSpec(), "float32"),
        (SPEC_818, "BW-α-QIG(818)"),
        (QuantSpec(input_bits=6, weight_bits=2, gradient_bits=6), "TW-QIG(626)"),
        (QuantSpec(weight_bits=1), "BW"),
    ],
)
def test_settings_have_the_papers_names(spec: QuantSpec, name: str) -> None:
    assert spec.name == name
