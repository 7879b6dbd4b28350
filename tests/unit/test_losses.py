"""Targets and losses of both supervisions, by hand, and prediction from each."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcunet.config import RunConfig, TrainingConfig
from fedcunet.data import FACE68, load
from fedcunet.data.crops import Crops
from fedcunet.data.heatmaps import decode_heatmaps, gaussian_heatmaps
from fedcunet.training.evaluation import predict
from fedcunet.training.local import make_optimizer, train_pass
from fedcunet.training.losses import (
    detection_loss,
    disc_heatmaps,
    make_targets,
    regression_loss,
    supervised_loss,
    supervisions_of,
)
from fedcunet.training.network import build_network


def disc(x: float, y: float, radius: float, *, labelled: bool = True) -> Tensor:
    """A map of 6 by 6, stride 1, for one point."""
    points, mark = torch.tensor([[[x, y]]]), torch.tensor([[labelled]])
    return disc_heatmaps(points, mark, side=6, stride=1, radius=radius)[0, 0]


def test_a_disc_holds_the_pixels_whose_centres_are_within_its_radius() -> None:
    assert disc(2, 3, 1).nonzero().tolist() == [[2, 2], [3, 1], [3, 2], [3, 3], [4, 2]]
    # Off a centre: (2.4, 3) is at most 0.7 from columns 2 and 3 of row 3 alone.
    assert disc(2.4, 3, 0.7).nonzero().tolist() == [[3, 2], [3, 3]]
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    for x, y, radius in [(2.3, 3.1, 1.7), (0.2, 5.4, 2.0), (3.0, 3.0, 2.0), (1.5, 2.5, 2.5)]:
        expected = (columns - x) ** 2 + (rows - y) ** 2 <= radius**2 + 1e-5
        assert torch.equal(disc(x, y, radius).bool(), expected)


def test_a_disc_stands_where_the_gaussian_of_the_same_point_does() -> None:
    points, mark = torch.tensor([[[21.5, 37.5]]]), torch.tensor([[True]])
    found = disc_heatmaps(points, mark, side=16, stride=4, radius=2.0)
    peak = gaussian_heatmaps(points, mark, side=16, stride=4, sigma=1.0)
    assert found.sum() == 13  # pixels within 2 of a pixel's centre
    assert found.flatten()[peak.argmax()] == 1
    assert torch.allclose(
        (found[0, 0] / found.sum() * torch.arange(16.0)[None, :]).sum(), torch.tensor(5.0)
    )


def test_unlabelled_points_and_points_outside_have_empty_discs() -> None:
    assert not disc(2, 3, 2, labelled=False).any()
    assert not disc(math.nan, 3, 2, labelled=False).any()
    assert not disc(-0.6, 3, 2).any()
    assert not disc(2, 5.6, 2).any()
    assert disc(-0.4, 5.4, 2).any()


def test_only_the_targets_that_are_asked_for_are_made() -> None:
    points, mark = torch.tensor([[[8.0, 8.0]]]), torch.tensor([[True]])

    def made(*supervisions: str) -> dict[str, Tensor]:
        return make_targets(supervisions, points, mark, side=8, stride=4, sigma=1.5)

    assert list(made("detection", "detection")) == ["detection"]
    assert list(made("regression")) == ["regression"]
    both = made("detection", "regression")
    assert torch.equal(
        both["regression"], gaussian_heatmaps(points, mark, side=8, stride=4, sigma=1.5)
    )
    # The radius is twice sigma.
    assert torch.equal(both["detection"], disc_heatmaps(points, mark, side=8, stride=4, radius=3.0))


def test_squared_errors_and_their_gradients_are_autograds_to_the_bit() -> None:
    torch.manual_seed(0)
    shape, labelled = (3, 5, 8, 8), torch.rand(3, 5) < 0.7
    target = torch.rand(shape)
    found, plain = ([torch.randn(shape, requires_grad=True) for _ in range(2)] for _ in range(2))
    for ours, theirs in zip(found, plain, strict=True):
        theirs.data.copy_(ours.data)
    weight = labelled[:, :, None, None].float()
    count = weight.sum() * 64
    losses = [((one - target).square() * weight).sum() / count for one in plain]
    loss = regression_loss(found, target, labelled)
    assert torch.equal(loss, torch.stack(losses).sum())
    (3 * loss).backward()
    (3 * torch.stack(losses).sum()).backward()
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def test_the_loss_keeps_nothing_beside_the_heatmaps() -> None:
    kept: list[Tensor] = []
    heatmaps = [torch.randn(2, 5, 8, 8, requires_grad=True) * 1 for _ in range(3)]
    target, labelled = torch.rand(2, 5, 8, 8), torch.ones(2, 5, dtype=torch.bool)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        regression_loss(heatmaps, target, labelled)
    known = {tensor.data_ptr() for tensor in [*heatmaps, target]}
    assert [one.shape for one in kept if one.numel() > 10 and one.data_ptr() not in known] == []


def test_cross_entropy_by_hand() -> None:
    target = torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]]]])
    logits = [torch.tensor([[[[0.0, 2.0]], [[50.0, -3.0]]]]), torch.zeros(1, 2, 1, 2)]
    labelled = torch.tensor([[True, False]])
    # -log sigmoid(0) = log 2; -log(1 - sigmoid(2)) = log(1 + e^2); the unlabelled map is left out.
    first = (math.log(2) + math.log(1 + math.exp(2))) / 2
    assert detection_loss(logits, target, labelled).item() == pytest.approx(first + math.log(2))
    assert detection_loss(logits, target, ~torch.ones_like(labelled)).item() == 0


def test_cross_entropy_is_finite_for_the_largest_logits() -> None:
    logits = torch.tensor([[[[1e4, -1e4]]]], requires_grad=True)
    target, labelled = torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[True]])
    loss = detection_loss([logits], target, labelled)
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == [0.5, -0.5]


def test_each_heatmap_is_held_against_the_target_of_its_supervision() -> None:
    torch.manual_seed(0)
    heatmaps = list(torch.randn(3, 2, 4, 8, 8))
    targets = {"regression": torch.rand(2, 4, 8, 8), "detection": torch.ones(2, 4, 8, 8)}
    labelled = torch.rand(2, 4) < 0.7
    mixed = supervised_loss(heatmaps, ("detection", "regression", "detection"), targets, labelled)
    expected = regression_loss(heatmaps[1:2], targets["regression"], labelled)
    expected = expected + detection_loss(heatmaps[::2], targets["detection"], labelled)
    assert mixed.item() == pytest.approx(expected.item(), rel=1e-6)
    alone = {"regression": targets["regression"]}
    assert torch.equal(
        supervised_loss(heatmaps, ("regression",) * 3, alone, labelled),
        regression_loss(heatmaps, targets["regression"], labelled),
    )


def test_probabilities_of_a_disc_decode_to_its_centre() -> None:
    generator = torch.Generator().manual_seed(1808)
    points = 16 + 32 * torch.rand(1, 100, 2, generator=generator)
    spread = 1.2 * torch.randn(300, 1, 2, generator=generator)  # crop pixels
    mark = torch.ones(300, 100, dtype=torch.bool)
    many = make_targets(("detection",), points + spread, mark, side=16, stride=4, sigma=1.0)
    probability = many["detection"].mean(dim=0, keepdim=True)
    distance = (decode_heatmaps(probability, stride=4) - points).norm(dim=2) / 4
    assert distance.mean() < 0.1


@pytest.fixture
def crops(make_300w: Callable[..., Path]) -> Crops:
    root = make_300w({"helen/testset": [f"{n}_1.jpg" for n in range(2)]})
    return Crops(load("300w", root, "test").annotations, FACE68, size=64)


class Fixed(nn.Module):
    """Puts out the same maps for every image, far too large for the exponentials of a sigmoid."""

    def __init__(self, maps_KSS: Tensor, supervision: str) -> None:
        super().__init__()
        self.maps_KSS = nn.Parameter(maps_KSS)
        self.supervisions = ("regression", supervision)

    def forward(self, image_B3SS: Tensor) -> list[Tensor]:
        heatmap_BKSS = self.maps_KSS.expand(len(image_B3SS), *self.maps_KSS.shape)
        return [torch.zeros_like(heatmap_BKSS), heatmap_BKSS]


def test_prediction_takes_the_last_heatmaps_and_the_probabilities_of_logits(crops: Crops) -> None:
    maps = gaussian_heatmaps(
        torch.tensor([[[21.0, 40.0]]]), torch.tensor([[True]]), side=16, stride=4, sigma=1.2
    )[0]
    logits = torch.logit(maps.clamp(1e-6, 1 - 1e-6))
    for network in (Fixed(maps, "regression"), Fixed(logits, "detection")):
        assert np.allclose(predict(network, crops), [21.0, 40.0], atol=0.05)
    assert not np.allclose(predict(Fixed(logits, "regression"), crops), [21.0, 40.0], atol=0.05)


@pytest.mark.parametrize(
    ("supervision", "refined"), [("detection", None), ("detection", "regression")]
)
def test_training_lowers_the_loss_of_every_supervision(
    crops: Crops, supervision: str, refined: str | None
) -> None:
    config = RunConfig().replace(
        model__unets=1,
        model__order=0,
        model__supervision=supervision,
        model__iterative=refined is not None,
        model__refined_supervision=refined,
        quant__bits="8,1,8",
        quant__alpha=True,
    )
    model = build_network(config, 68)
    assert supervisions_of(model)[-1] == (refined or supervision)
    optimizer = make_optimizer(model, TrainingConfig(optimizer="adam"), 3e-3)
    losses = [
        train_pass(
            model,
            crops,
            optimizer,
            batch_size=2,
            num_epochs=1,
            sigma=1.0,
            augmentation=None,
            seed=(0, step),
        ).loss
        for step in range(5)
    ]
    assert losses[-1] < 0.8 * losses[0]
    assert predict(model, crops).shape == (2, 68, 2)
