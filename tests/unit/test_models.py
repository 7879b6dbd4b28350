"""DU-Net: its size to the last parameter, its shapes, its links."""

import pytest
import torch

from fedcunet.errors import UserError
from fedcunet.models import DUNet, supervised_unets
from fedcunet.models.dunet import convolution_parameters

# Millions of convolution parameters by (n, landmarks), for K = 0, 1, ...; paper, Table 1, Fig. 4.
MILLIONS = {
    (4, 16): [3.582, 3.902, 4.115, 4.221],
    (8, 16): [7.162, 7.908, 8.547, 9.079, 9.505, 9.825, 10.038, 10.144],
    (16, 16): [14.322, 15.919],
    (4, 68): [3.609, 3.928],
}


def build_meta(num_unets: int, order: int, num_landmarks: int) -> DUNet:
    """A DU-Net without storage, for counting."""
    with torch.device("meta"):
        return DUNet(num_unets, order, num_landmarks)


@pytest.mark.parametrize(("network", "millions"), MILLIONS.items(), ids=str)
def test_convolution_parameters_are_the_papers(
    network: tuple[int, int], millions: list[float]
) -> None:
    num_unets, num_landmarks = network
    for order, expected in enumerate(millions):
        model = build_meta(num_unets, order, num_landmarks)
        assert round(convolution_parameters(model) / 1e6, 3) == expected


def test_convolution_parameters_follow_the_formula_of_the_blocks() -> None:
    # n = 3, K = 2, c = 128, g = 32: summed by hand from the widths of section 3.2.
    total = 3 * 7 * 7 * 128 + 3 * 128 * 5
    for i in range(3):
        links = min(i, 2)
        for own, adapters in [(128, 2)] * 4 + [(128, 1)] + [(256, 1)] * 4:
            linked = own + 32 * links
            total += linked * 128 + 128 * 32 * 9 + adapters * (linked + 32) * 128
        total += (128 + 128 * links) * 128 if i else 0
    assert convolution_parameters(build_meta(3, 2, 5)) == total


def test_float32_state_of_sixteen_unets_is_62_mebibytes() -> None:
    state = build_meta(16, 1, 16).state_dict()
    assert sum(4 * tensor.numel() for tensor in state.values()) / 2**20 == pytest.approx(62.3, 1e-3)


@pytest.mark.parametrize("size", [64, 192])
def test_every_supervised_unet_puts_out_heatmaps_of_a_quarter_of_the_size(size: int) -> None:
    model = DUNet(3, 1, 5, num_supervisions=2, width=16, growth=4).eval()
    with torch.no_grad():
        heatmaps = model(torch.zeros(2, 3, size, size))
    assert [tuple(heatmap.shape) for heatmap in heatmaps] == [(2, 5, size // 4, size // 4)] * 2


def test_supervisions_are_spread_and_end_at_the_last_unet() -> None:
    assert supervised_unets(4, 4) == (0, 1, 2, 3)
    assert supervised_unets(4, 2) == (1, 3)
    assert supervised_unets(5, 1) == (4,)


def test_gradients_reach_every_parameter() -> None:
    model = DUNet(3, 2, 4, width=8, growth=4)
    sum(heatmap.square().mean() for heatmap in model(torch.rand(2, 3, 64, 64))).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The last U-Net's skip inputs are all used; ReLUs may kill single channels, never a tensor.
    assert without == []


def test_order_zero_does_not_look_at_earlier_features() -> None:
    linked, unlinked = build_meta(2, 1, 4), build_meta(2, 0, 4)
    assert linked.unets[1].neck.reduce.conv.in_channels == 160
    assert unlinked.unets[1].neck.reduce.conv.in_channels == 128


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 0, 5), "number of U-Nets: expected at least 1, found 0"),
        ((2, 2, 5), "expected 0 to 1, found 2"),
        ((2, 1, 0), "number of landmarks"),
    ],
)
def test_impossible_networks_are_refused(arguments: tuple[int, int, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        DUNet(*arguments)


def test_a_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="expected multiples of 64, found 100x64"):
        DUNet(1, 0, 2, width=8, growth=4)(torch.zeros(1, 3, 100, 64))
