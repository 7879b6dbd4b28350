"""Heatmaps and their decoding."""

import numpy as np
import pytest
import torch

from fedcunet.data.heatmaps import decode_heatmaps, gaussian_heatmaps


def _points(generator: np.random.Generator, low: float, high: float) -> torch.Tensor:
    return torch.from_numpy(generator.uniform(low, high, (40, 20, 2)))


def _labels(points_BK2: torch.Tensor) -> torch.Tensor:
    return torch.ones(points_BK2.shape[:2], dtype=torch.bool)


def test_a_point_on_a_pixel_centre_gives_one_there_and_the_gaussian_around_it() -> None:
    # Crop (13.5, 9.5) with stride 4 is heatmap (3, 2).
    point_BK2 = torch.tensor([[[13.5, 9.5]]])
    maps = gaussian_heatmaps(point_BK2, _labels(point_BK2), side=8, stride=4, sigma=1.0)
    assert maps.shape == (1, 1, 8, 8)
    assert maps.dtype == torch.float32
    assert maps[0, 0, 2, 3] == 1.0
    assert maps[0, 0, 2, 4] == pytest.approx(np.exp(-0.5))
    assert maps[0, 0, 4, 2] == pytest.approx(np.exp(-2.5))


def test_unlabelled_points_and_points_outside_the_map_give_zeros() -> None:
    points_BK2 = torch.tensor([[[8.0, 8], [8, 8], [-0.6, 8], [8, 31.6], [torch.nan, 2]]])
    labelled_BK = torch.tensor([[True, False, True, True, False]])
    maps = gaussian_heatmaps(points_BK2, labelled_BK, side=8, stride=4, sigma=1.0)
    assert maps[0, 0].max() > 0.8
    assert (maps[0, 1:] == 0).all()


@pytest.mark.parametrize(("side", "stride"), [(16, 4), (64, 4), (32, 2)])
@pytest.mark.parametrize("sigma", [1.0, 1.5, 2.0])
def test_clean_heatmaps_give_their_points_back_also_at_the_border(
    generator: np.random.Generator, side: int, stride: int, sigma: float
) -> None:
    points_BK2 = _points(generator, -0.5, side * stride - 0.5)
    points_BK2[0, :4] = torch.tensor([[-0.4, -0.4], [side * stride - 0.6, 0], [0, 5], [5, 0]])
    maps = gaussian_heatmaps(points_BK2, _labels(points_BK2), side=side, stride=stride, sigma=sigma)
    error = (decode_heatmaps(maps, stride=stride) - points_BK2).norm(dim=2).max() / stride
    assert error < 0.001


@pytest.mark.parametrize(
    ("low", "high", "bound"), [(8.0, 54.0, 0.08), (-0.5, 4.0, 0.25)], ids=["inside", "corner"]
)
def test_noise_of_a_twentieth_of_the_peak_moves_points_little(
    generator: np.random.Generator, low: float, high: float, bound: float
) -> None:
    points_BK2 = _points(generator, low, high)
    maps = gaussian_heatmaps(points_BK2, _labels(points_BK2), side=16, stride=4, sigma=1.0)
    noise = torch.from_numpy(generator.normal(0, 0.05, maps.shape)).float()
    decoded = decode_heatmaps(0.3 * (maps + noise), stride=4)
    assert (decoded - points_BK2).norm(dim=2).mean() / 4 < bound


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0, torch.nan, torch.inf, -torch.inf])
def test_maps_without_a_peak_give_their_centre(value: float) -> None:
    decoded = decode_heatmaps(torch.full((2, 3, 8, 16), value), stride=4)
    assert (decoded == torch.tensor([31.5, 15.5])).all()


def test_maps_below_zero_and_values_that_are_not_finite_still_give_the_peak() -> None:
    maps = torch.full((1, 2, 16, 16), -5.0)
    maps[0, :, 3, 6] = -1.0
    maps[0, 1, 9, 9] = torch.nan
    decoded = decode_heatmaps(maps, stride=4)
    torch.testing.assert_close(decoded, torch.tensor([[[25.5, 13.5], [25.5, 13.5]]]))


def test_any_map_decodes_to_finite_points_inside_it(generator: np.random.Generator) -> None:
    for scale in (1e-30, 1e-3, 1.0, 1e30):
        maps = torch.from_numpy(generator.normal(0, scale, (4, 30, 16, 16))).float()
        decoded = decode_heatmaps(maps, stride=4)
        assert decoded.isfinite().all()
        assert decoded.min() >= -0.5
        assert decoded.max() <= 63.5


def test_decoding_takes_no_gradient_and_no_landmarks() -> None:
    maps = torch.zeros((2, 0, 8, 8), requires_grad=True)
    assert decode_heatmaps(maps, stride=4).shape == (2, 0, 2)
    assert not decode_heatmaps(torch.rand(1, 1, 8, 8, requires_grad=True), stride=4).requires_grad
