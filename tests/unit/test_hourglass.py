"""Stacked U-Nets: their size to the last parameter, their shapes, what goes from stack to stack."""

import json

import pytest
import torch
from torch import Tensor, nn

from fedcunet.commands.machine import sizes
from fedcunet.config import RunConfig
from fedcunet.errors import UserError
from fedcunet.models import StackedHourglass
from fedcunet.models.dunet import convolution_parameters
from fedcunet.models.hourglass import HourglassHead, Residual
from fedcunet.quant import QuantConv2d, QuantSpec, quantise_network
from fedcunet.training.network import build_network, get_vector, network_layout, set_vector

# Convolution weights by number of U-Nets, 16 landmarks, beside millions in the paper's Table 1.
COUNTS = {4: (12_924_096, 12.9), 8: (25_408_704, 25.5), 16: (50_377_920, 50.5)}


def counted(num_unets: int, num_landmarks: int = 16) -> int:
    with torch.device("meta"):
        return convolution_parameters(StackedHourglass(num_unets, num_landmarks))


@pytest.mark.parametrize(("num_unets", "expected"), COUNTS.items())
def test_convolution_parameters_are_about_the_papers(
    num_unets: int, expected: tuple[int, float]
) -> None:
    exact, millions = expected
    assert counted(num_unets) == exact
    assert exact / 1e6 == pytest.approx(millions, rel=0.005)


def test_convolution_parameters_follow_the_layers() -> None:
    def residual(inputs: int, outputs: int) -> int:
        half = outputs // 2
        skip = inputs * outputs if inputs != outputs else 0
        return inputs * half + half * half * 9 + half * outputs + skip

    stem = 3 * 64 * 49 + residual(64, 128) + residual(128, 256) + residual(256, 256)
    unet = (3 * 4 + 1 + 1) * residual(256, 256) + 256 * 256
    head, handed_on = 256 * 5, 256 * 256 + 5 * 256
    assert counted(3, 5) == stem + 3 * (unet + head) + 2 * handed_on


def test_no_convolution_has_a_bias() -> None:
    model = StackedHourglass(2, 3, width=8)
    assert all(module.bias is None for module in model.modules() if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize("size", [64, 192])
def test_every_supervised_unet_puts_out_heatmaps_of_a_quarter_of_the_size(size: int) -> None:
    model = StackedHourglass(3, 5, num_supervisions=2, width=8).eval()
    with torch.no_grad():
        heatmaps = model(torch.zeros(2, 3, size, size))
    assert [tuple(heatmap.shape) for heatmap in heatmaps] == [(2, 5, size // 4, size // 4)] * 2
    assert model.supervisions == ("regression", "regression")
    assert model.end_layers() == ("stem.conv", "heads.0.predict", "heads.2.predict")


@pytest.mark.parametrize("num_supervisions", [1, 3])
def test_gradients_reach_every_parameter(num_supervisions: int) -> None:
    model = StackedHourglass(3, 4, num_supervisions=num_supervisions, width=8)
    sum(heatmap.square().mean() for heatmap in model(torch.rand(2, 3, 64, 64))).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_a_residual_without_its_branch_is_its_input() -> None:
    residual, x = Residual(8, 8), torch.randn(2, 8, 4, 4)
    nn.init.zeros_(residual.expand.conv.weight)
    assert torch.equal(residual(x), x)


def test_the_next_input_is_the_sum_of_input_features_and_predictions() -> None:
    model = StackedHourglass(2, 3, width=8).eval()
    x = torch.randn(1, 8, 16, 16)
    with torch.no_grad():
        (first, _), inputs = model.run_unets(x, model.heads)
        expected = x + model.links[0](model.unets[0](x)) + model.heads["0"].remap(first)
    assert torch.equal(inputs[0], x)
    assert torch.allclose(inputs[1], expected, atol=1e-6)


def test_of_a_detection_head_the_probabilities_go_on() -> None:
    head = HourglassHead(4, 2, supervision="detection", is_last=False)
    logits, remapped = head(torch.randn(1, 4, 3, 3))
    assert torch.allclose(remapped, head.remap(logits.sigmoid()))
    assert (
        HourglassHead(4, 2, supervision="detection", is_last=True)(logits.repeat(1, 2, 1, 1))[1]
        is None
    )


@pytest.mark.parametrize(
    ("weights", "alpha", "quantizer", "scale"),
    [
        (1, False, "paper", "tensor"),
        (1, True, "ranged", "channel"),
        (2, False, "ranged", "tensor"),
        (2, True, "source", "channel"),
        (32, False, "paper", "channel"),
        (32, False, "source", "tensor"),
    ],
)
def test_every_quantised_form_trains_with_finite_gradients(
    weights: int, alpha: bool, quantizer: str, scale: str
) -> None:
    spec = QuantSpec(
        input_bits=6,
        weight_bits=weights,
        gradient_bits=8,
        alpha=alpha,
        input_quantizer=quantizer,
        gradient_scale=scale,
    )
    model = quantise_network(StackedHourglass(2, 3, width=8), spec)
    heatmaps = model(torch.rand(2, 3, 64, 64))
    sum(heatmap.square().mean() for heatmap in heatmaps).backward()
    assert all(heatmap.isfinite().all() for heatmap in heatmaps)
    gradients: list[Tensor | None] = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    plain = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and not isinstance(module, QuantConv2d)
    ]
    assert sorted(plain) == sorted(model.end_layers())


def test_state_travels_as_one_vector_whose_coarse_part_is_the_hidden_convolutions() -> None:
    config = RunConfig().replace(model__kind="stacked", model__unets=1)
    model = build_network(config, 3)
    layout = network_layout(model)
    coarse = [name for name, fine in zip(layout.names, layout.fine, strict=True) if not fine]
    assert len(coarse) == sum(isinstance(m, nn.Conv2d) for m in model.modules()) - 2
    assert "unets.0.conv.weight" in coarse
    assert not {"stem.conv.weight", "heads.0.predict.weight"} & set(coarse)
    vector = get_vector(model) + 1
    set_vector(model, vector)
    assert (get_vector(model) == vector).all()


def test_impossible_networks_and_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="number of U-Nets: expected at least 1, found 0"):
        StackedHourglass(0, 5)
    with pytest.raises(UserError, match="number of landmarks"):
        StackedHourglass(1, 0)
    with pytest.raises(UserError, match="number of supervisions: expected 1 to 2, found 3"):
        StackedHourglass(2, 5, num_supervisions=3)
    with pytest.raises(UserError, match="expected multiples of 64, found 64x96"):
        StackedHourglass(1, 2, width=8)(torch.zeros(1, 3, 64, 96))


def test_sizes_counts_stacked_unets_and_says_that_they_have_no_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes(model="stacked", unets=4, order=1, alpha=True, as_json=True)
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["conv_parameters"] == COUNTS[4][0]
    assert found["bytes_packed"] < 0.06 * found["bytes_float32"]
    assert err == "--order has no effect with --model stacked\n"
    sizes(model="dunet", unets=4, iterative=True, as_json=True)
    assert json.loads(capsys.readouterr().out)["conv_parameters"] == 4_094_336
