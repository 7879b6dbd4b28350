"""Iterative refinement: what it adds, which inputs it merges, and whose supervision is whose."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from fedcunet.config import RunConfig
from fedcunet.errors import UserError
from fedcunet.models import DUNet, IterativeRefinement, StackedHourglass
from fedcunet.models.dunet import convolution_parameters
from fedcunet.quant import QuantConv2d, QuantSpec, quantise_network
from fedcunet.training.network import build_network, get_vector, network_layout

SUPERVISIONS = ("regression", "detection")


def dunet(supervision: str = "regression") -> DUNet:
    return DUNet(2, 1, 3, supervision=supervision, width=16, growth=4)


def stacked(supervision: str = "regression") -> StackedHourglass:
    return StackedHourglass(2, 3, supervision=supervision, width=8)


@pytest.mark.parametrize("num_landmarks", [16, 68])
def test_refinement_adds_a_fifth_of_a_million_convolution_parameters(num_landmarks: int) -> None:
    with torch.device("meta"):
        plain = DUNet(4, 1, num_landmarks)
    with torch.device("meta"):
        refined = IterativeRefinement(DUNet(4, 1, num_landmarks))
    merge = 256 * 128 + 288 * 128 + 2 * 128 * 32 * 9 + 320 * 128
    heads = 4 * 128 * num_landmarks
    added = convolution_parameters(refined) - convolution_parameters(plain)
    assert added == merge + heads
    assert round(convolution_parameters(plain) / 1e6, 1) == 3.9
    assert round(convolution_parameters(refined) / 1e6, 1) == 4.1


@pytest.mark.parametrize(("first", "second"), list(product(SUPERVISIONS, SUPERVISIONS)))
@pytest.mark.parametrize("kind", ["dunet", "stacked"])
def test_each_pass_has_heatmaps_with_its_own_supervision(
    kind: str, first: str, second: str
) -> None:
    network = dunet(first) if kind == "dunet" else stacked(first)
    model = IterativeRefinement(network, second).eval()
    with torch.no_grad():
        heatmaps = model(torch.rand(1, 3, 64, 64))
        alone = network(torch.rand(1, 3, 64, 64))
    assert [tuple(heatmap.shape) for heatmap in heatmaps] == [(1, 3, 16, 16)] * 4
    assert model.supervisions == (first, first, second, second)
    assert len(alone) == 2


@pytest.mark.parametrize("make", [dunet, stacked])
def test_the_first_pass_is_the_network_alone(make: type[nn.Module]) -> None:
    network, image = make(), torch.rand(2, 3, 64, 64)
    alone = copy.deepcopy(network)
    for ours, theirs in zip(IterativeRefinement(network)(image), alone(image), strict=False):
        assert torch.equal(ours, theirs)
    # Nor does the second pass leave anything in its running statistics.
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(
            network.state_dict().values(), alone.state_dict().values(), strict=True
        )
    )


def test_the_second_pass_starts_from_the_inputs_of_the_first_and_the_last_unet() -> None:
    network = DUNet(3, 1, 2, width=16, growth=4)
    model = IterativeRefinement(network).eval()
    seen: list[list[torch.Tensor]] = [[] for _ in network.unets]
    merged: list[tuple[torch.Tensor, ...]] = []
    refined: list[torch.Tensor] = []
    for unet, inputs in zip(network.unets, seen, strict=True):
        unet.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0]))
    model.merge.register_forward_pre_hook(lambda _, given: merged.append(given))
    model.merge.register_forward_hook(lambda *given: refined.append(given[2]))
    with torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
    assert [len(inputs) for inputs in seen] == [2, 2, 2]
    ((first, last),) = merged
    assert torch.equal(first, seen[0][0])
    assert torch.equal(last, seen[2][0])
    assert torch.equal(refined[0], seen[0][1])


@pytest.mark.parametrize("make", [dunet, stacked])
def test_gradients_reach_every_parameter(make: type[nn.Module]) -> None:
    model = IterativeRefinement(make())
    sum(heatmap.square().mean() for heatmap in model(torch.rand(2, 3, 64, 64))).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_passes_share_convolutions_and_keep_batchnorm_layers_apart() -> None:
    network = dunet()
    model = IterativeRefinement(network)
    names = list(model.state_dict())
    model(torch.rand(4, 3, 64, 64))
    assert list(model.state_dict()) == names
    norm, own = network.unets[0].down[0].reduce.norm, model.norms[0]
    assert norm.num_batches_tracked == own.num_batches_tracked == 1
    assert not torch.allclose(norm.running_mean, own.running_mean)
    shared = [m for p in (network.unets, network.links) for m in p.modules()]
    assert len(model.norms) == sum(isinstance(module, nn.BatchNorm2d) for module in shared)


def test_a_failing_second_pass_leaves_the_network_as_it_was() -> None:
    network = dunet()
    model = IterativeRefinement(network)
    before = [id(module) for module in model.modules()]
    model.heads["0"].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.rand(2, 3, 64, 64))
    assert [id(module) for module in model.modules()] == before


def test_running_statistics_fit_the_pass_that_they_are_used_in() -> None:
    torch.manual_seed(0)
    model = IterativeRefinement(dunet())
    coarse = torch.rand(16, 3, 4, 4)
    image = nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the running statistics are those of the last batch
    with torch.no_grad():
        training = model(image)
        evaluation = model.eval()(image)
    # What is left is the n / (n - 1) of running variances, large where a map is one pixel; with
    # BatchNorm layers that both passes share the ratios are 10 to 100.
    for trained, evaluated in zip(training, evaluation, strict=True):
        assert (evaluated - trained).std() < trained.std()


@pytest.mark.parametrize("make", [dunet, stacked])
@pytest.mark.parametrize("weights", [1, 2, 32])
def test_quantised_refinement_trains_with_finite_gradients(
    make: type[nn.Module], weights: int
) -> None:
    spec = QuantSpec(input_bits=8, weight_bits=weights, gradient_bits=8, alpha=weights != 32)
    model = quantise_network(IterativeRefinement(make("detection"), "regression"), spec)
    heatmaps = model(torch.rand(2, 3, 64, 64))
    sum(heatmap.square().mean() for heatmap in heatmaps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    plain = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and not isinstance(module, QuantConv2d)
    ]
    assert sorted(plain) == sorted(model.end_layers())
    assert len(plain) == 1 + 2 * 2


def test_a_setting_names_kind_refinement_and_supervisions() -> None:
    config = RunConfig().replace(
        model__kind="stacked",
        model__unets=1,
        model__iterative=True,
        model__supervision="detection",
        model__refined_supervision="regression",
    )
    model = build_network(config, 2)
    assert isinstance(model, IterativeRefinement)
    assert isinstance(model.network, StackedHourglass)
    assert model.supervisions == ("detection", "regression")
    layout = network_layout(model)
    assert len(get_vector(model)) == layout.num_parameters
    fine = dict(zip(layout.names, layout.fine, strict=True))
    assert fine["heads.0.predict.weight"]
    assert fine["norms.0.running_var"]
    assert not fine["merge.adapt.conv.weight"]


def test_settings_that_would_have_no_effect_or_no_meaning_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.refined-supervision: expected with model\.itera"):
        RunConfig().replace(model__refined_supervision="detection")
    with pytest.raises(UserError, match=r"model\.supervision': expected one of regression, detec"):
        RunConfig().replace(model__supervision="segmentation")
    with pytest.raises(UserError, match=r"model\.kind': expected one of dunet, stacked"):
        RunConfig().replace(model__kind="hourglass")
    with pytest.raises(UserError, match="expected multiples of 64"):
        IterativeRefinement(dunet())(torch.zeros(1, 3, 100, 64))
