"""Local training, schedules, evaluation, a network and the vector of its state."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedcunet.config import RunConfig, TrainingConfig
from fedcunet.data import FACE68, MPII16, LandmarkScheme, load
from fedcunet.data.crops import Crops
from fedcunet.errors import UserError
from fedcunet.quant.layers import quantised_weights
from fedcunet.training.checkpoint import (
    tensors_sha256,
)
from fedcunet.training.evaluation import evaluate_mean_shape, mean_shape, predict, score
from fedcunet.training.local import (
    augmentation_of,
    batches,
    make_optimizer,
    train_pass,
)
from fedcunet.training.losses import regression_loss
from fedcunet.training.network import (
    build_network,
    get_vector,
    network_layout,
    set_vector,
    state_tensors,
)
from fedcunet.training.schedule import rate_factor
from fedcunet.variances import VARIANCE_SUFFIX, kept, to_variances
from tests.made_networks import SMALL as CONFIG


def test_paper_schedules_divide_at_the_papers_epochs() -> None:
    def factors(is_face: bool) -> list[float]:
        epochs = (0, 29, 30, 60, 90, 100)
        return [rate_factor("paper", epoch=e, num_epochs=200, is_face=is_face) for e in epochs]

    assert factors(True) == pytest.approx([1, 1, 1 / 5, 1 / 10, 1 / 20, 1 / 20])
    assert factors(False) == pytest.approx([1, 1, 1, 1, 1, 1 / 5])


def test_other_schedules() -> None:
    assert rate_factor("constant", epoch=50, num_epochs=100, is_face=True) == 1
    assert rate_factor("cosine", epoch=0, num_epochs=100, is_face=True) == 1
    assert rate_factor("cosine", epoch=100, num_epochs=100, is_face=True) == pytest.approx(0.01)
    assert rate_factor("2:0.5,4:0.1", epoch=4, num_epochs=9, is_face=True) == pytest.approx(0.05)


@pytest.mark.parametrize("schedule", ["", "papr", "1:", "1:-1", "-1:2", "1:nan"])
def test_a_schedule_that_cannot_be_read_is_refused(schedule: str) -> None:
    with pytest.raises(UserError, match=r"training\.schedule"):
        rate_factor(schedule, epoch=0, num_epochs=1, is_face=True)


def test_no_batch_has_one_example_unless_all_have_and_none_more_than_was_measured() -> None:
    assert batches([1, 2, 3, 4], 2) == [[1, 2], [3, 4]]
    assert batches([1, 2, 3, 4, 5, 6, 7], 3) == [[1, 2, 3], [4, 5], [6, 7]]
    assert batches([1, 2, 3, 4, 5], 3) == [[1, 2, 3], [4, 5]]
    assert batches([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4, 5]]  # there is no other way
    assert batches([7], 2) == [[7, 7]]
    assert batches([7, 8, 9], 1) == [[7], [8], [9]]
    assert batches([], 2) == []


def test_no_gradient_of_a_step_is_kept_beside_the_maps_of_the_next(faces: Path) -> None:
    """As in the step that is measured, on whose peak a device's memory is planned."""
    model = build_network(CONFIG, 68)
    kept: list[int] = []

    def look(*_: object) -> None:
        kept.append(sum(one.grad is not None for one in model.parameters()))

    model.register_forward_pre_hook(look)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))  # of whoever before
    train_pass(
        model,
        crops_of(faces, "train"),
        make_optimizer(model, TrainingConfig(optimizer="adam"), 1e-3),
        batch_size=2,
        num_epochs=1,
        sigma=1.0,
        augmentation=None,
        seed=(0,),
    )
    look()
    assert kept == [0, 0, 0, 0]


def test_loss_is_summed_over_heads_and_leaves_unlabelled_landmarks_out() -> None:
    target = torch.zeros(1, 2, 4, 4)
    heatmaps = [torch.full((1, 2, 4, 4), 0.5), torch.ones(1, 2, 4, 4)]
    heatmaps[0][0, 1] = 100
    labelled = torch.tensor([[True, False]])
    assert regression_loss(heatmaps, target, labelled).item() == pytest.approx(0.25 + 1)
    assert regression_loss(heatmaps, target, ~torch.ones_like(labelled)).item() == 0


def crops_of(root: Path, subset: str) -> Crops:
    return Crops(load("300w", root, subset).annotations, FACE68, size=64)


def trained(root: Path, seed: tuple[int, ...]) -> tuple[str, float]:
    model = build_network(CONFIG, 68)
    result = train_pass(
        model,
        crops_of(root, "train"),
        make_optimizer(model, TrainingConfig(optimizer="rmsprop"), 1e-3),
        batch_size=4,
        num_epochs=1.5,
        sigma=1.0,
        augmentation=augmentation_of(CONFIG.data, FACE68),
        seed=seed,
    )
    assert (result.num_examples, result.num_steps) == (9, 3)
    return tensors_sha256(model), result.loss


def test_people_are_mirrored_and_faces_are_not_unless_told() -> None:
    def flips(name: str, scheme: LandmarkScheme) -> bool:
        return augmentation_of(CONFIG.replace(data__flip=name).data, scheme).flip

    assert [flips(name, MPII16) for name in ("paper", "always", "never")] == [True, True, False]
    assert [flips(name, FACE68) for name in ("paper", "always", "never")] == [False, True, False]


def test_training_follows_from_its_seed_alone(faces: Path) -> None:
    assert trained(faces, (0, 1)) == trained(faces, (0, 1))
    assert trained(faces, (0, 1)) != trained(faces, (0, 2))


def test_training_learns_a_few_pictures_by_heart(faces: Path) -> None:
    config = RunConfig().replace(model__unets=1, model__order=0)
    model, crops = build_network(config, 68), crops_of(faces, "train")
    optimizer = make_optimizer(model, TrainingConfig(optimizer="adam"), 5e-3)
    losses = [
        train_pass(
            model,
            crops,
            optimizer,
            batch_size=6,
            num_epochs=1,
            sigma=1.0,
            augmentation=None,
            seed=(0, step),
        ).loss
        for step in range(60)
    ]
    assert losses[-1] < 0.6 * losses[10]
    distance = np.linalg.norm(predict(model, crops) - crops.targets()[0], axis=2)
    assert np.median(distance) < 6  # one and a half heatmap pixels; a blind guess is off by 15


def test_latent_weights_stay_within_one_while_training(faces: Path) -> None:
    model = build_network(CONFIG, 68)
    train_pass(
        model,
        crops_of(faces, "train"),
        make_optimizer(model, TrainingConfig(optimizer="sgd"), 5000.0),
        batch_size=4,
        num_epochs=0.5,
        sigma=1.0,
        augmentation=None,
        seed=(0,),
    )
    assert max(float(weight.detach().abs().max()) for weight in quantised_weights(model)) == 1


def test_mean_shape_ignores_what_is_not_labelled() -> None:
    class TwoPoints:
        def targets(self) -> tuple[np.ndarray, np.ndarray]:
            points = np.array([[[2.0, 2.0], [9.0, 9.0]], [[4.0, 6.0], [1.0, 3.0]]])
            return points, np.array([[True, False], [True, True]])

    assert mean_shape(TwoPoints()).tolist() == [[3, 4], [1, 3]]


def test_mean_shape_of_one_face_is_exact_on_itself(faces: Path) -> None:
    one = load("300w", faces, "test")
    crops = Crops(one.annotations[:1], FACE68, size=64)
    assert evaluate_mean_shape(crops, one, crops).percent == pytest.approx(0, abs=1e-9)


def test_pck_counts_points_within_a_fifth_of_the_torso() -> None:
    target = np.zeros((1, 14, 2))
    target[0, 9] = (0, 100)  # left shoulder; the right hip is at 0: a torso of 100
    predicted = target.copy()
    predicted[0, :7, 0] += 19
    predicted[0, 7:, 0] += 21
    found = score(predicted, target, np.ones((1, 14), dtype=bool), "pck")
    assert found.percent == 50
    assert found.metric_name == "pck_percent"


def test_vector_and_network_are_the_same_state() -> None:
    model = build_network(CONFIG, 68)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # not all 1
        for name, tensor in state_tensors(model).items():
            if name.endswith(VARIANCE_SUFFIX):
                logarithms = 3 * torch.randn(tensor.shape, generator=generator).numpy()
                tensor.copy_(torch.from_numpy(to_variances(kept(logarithms))))
    vector = get_vector(model)
    layout = network_layout(model)
    assert vector.shape == (layout.num_parameters,)
    named = layout.split(vector)
    for name, tensor in state_tensors(model).items():
        found = named[name]
        if name.endswith(VARIANCE_SUFFIX):
            found = to_variances(found).astype(np.float32)
        assert np.array_equal(found, tensor.numpy()), name
    fresh = build_network(CONFIG.replace(seed=5), 68)
    assert tensors_sha256(fresh) != tensors_sha256(model)
    set_vector(fresh, vector)
    assert tensors_sha256(fresh) == tensors_sha256(model)


def test_only_hidden_convolutions_are_coded_coarsely() -> None:
    layout = network_layout(build_network(CONFIG, 68))
    coarse = [name for name, fine in zip(layout.names, layout.fine, strict=True) if not fine]
    assert len(coarse) == 9 * 3 + 4
    assert all(name.startswith("unets.") and name.endswith(".conv.weight") for name in coarse)
    assert not any("num_batches_tracked" in name for name in layout.names)


@pytest.mark.parametrize(("size", "most"), [(64, 32), (128, 8), (512, 1)])
def test_a_batch_to_predict_on_has_few_pixels(
    make_300w: Callable[..., Path], size: int, most: int
) -> None:
    root = make_300w({"afw": [f"{number}_1.jpg" for number in range(40)]})
    crops = Crops(load("300w", root, "train").annotations, FACE68, size=size)
    seen: list[int] = []

    class Model(nn.Module):
        supervisions = ("regression",)

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, image_B3SS: torch.Tensor) -> list[torch.Tensor]:
            seen.append(len(image_B3SS))
            return [self.weight * torch.rand(len(image_B3SS), 68, 4, 4)]

    assert predict(Model(), crops).shape == (40, 68, 2)
    assert (max(seen), sum(seen)) == (most, 40)
