"""The flip test: a mirrored picture has exactly the mirrored prediction."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fedcunet.config import RunConfig
from fedcunet.data import (
    FACE68,
    LSP14,
    MPII16,
    SCHEMES,
    Annotation,
    AnnotationSet,
    LandmarkScheme,
)
from fedcunet.data.annotations import landmarks_in
from fedcunet.data.crops import Crops
from fedcunet.data.heatmaps import decode_heatmaps, gaussian_heatmaps
from fedcunet.training.evaluation import evaluate, mirror_heatmaps, predict
from fedcunet.training.network import build_network

SIDE = 64


def whole_picture(path: Path, image_HW3: np.ndarray, scheme: LandmarkScheme) -> Annotation:
    """The picture as its own crop, pixel by pixel."""
    cv2.imwrite(str(path), image_HW3)
    return Annotation(
        image=path,
        points_K2=np.tile([[20.0, 30.0]], (scheme.num_landmarks, 1)) + np.eye(2).sum(),
        labelled_K=np.ones(scheme.num_landmarks, dtype=bool),
        box_xywh=(-0.5, -0.5, SIDE, SIDE),
        box_origin="image",
        source="made",
        photo=path.stem,
    )


def picture_and_mirror(
    folder: Path, generator: np.random.Generator, scheme: LandmarkScheme
) -> list[Annotation]:
    noise_HW3 = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    image_HW3 = cv2.GaussianBlur(noise_HW3, (0, 0), 3)
    return [
        whole_picture(folder / "plain.png", image_HW3, scheme),
        whole_picture(folder / "mirror.png", image_HW3[:, ::-1], scheme),
    ]


@pytest.mark.parametrize("scheme", [FACE68, MPII16], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("supervision", ["regression", "detection"])
def test_a_mirrored_picture_has_the_mirrored_prediction(
    tmp_path: Path, generator: np.random.Generator, scheme: LandmarkScheme, supervision: str
) -> None:
    crops = Crops(picture_and_mirror(tmp_path, generator, scheme), scheme, size=SIDE)
    config = RunConfig().replace(
        model__unets=1, model__order=0, model__supervision=supervision, seed=3
    )
    model = build_network(config, scheme.num_landmarks)
    plain_K2, mirror_K2 = predict(model, crops, flip_test=True)
    order = list(scheme.flip_order)
    back_K2 = mirror_K2[order] * (-1, 1) + (SIDE - 1, 0)
    np.testing.assert_allclose(back_K2, plain_K2, atol=1e-3)
    # Without it the two are told apart: a network is not symmetric by itself.
    plain_K2, mirror_K2 = predict(model, crops)
    assert np.abs(mirror_K2[order] * (-1, 1) + (SIDE - 1, 0) - plain_K2).max() > 1


def test_a_network_of_mpii_mirrors_its_own_landmarks_on_the_people_of_lsp(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    found = picture_and_mirror(tmp_path, generator, LSP14)
    for annotation in found:
        annotation.points_K2[:] = generator.uniform(5, 60, (14, 2))
    people = AnnotationSet(
        name="made", subset="test", scheme=LSP14, annotations=tuple(found), problems=()
    )
    crops = Crops(found, LSP14, size=SIDE)
    model = build_network(RunConfig().replace(model__unets=1, model__order=0, seed=3), 16)
    order = list(MPII16.flip_order)
    plain_K2, mirror_K2 = predict(model, crops, flip_test=True, flip_order=order)
    np.testing.assert_allclose(mirror_K2[order] * (-1, 1) + (SIDE - 1, 0), plain_K2, atol=1e-3)
    landmarks = landmarks_in(MPII16, LSP14)
    result = evaluate(model, people, crops, landmarks=landmarks, flip_test=True, flip_order=order)
    assert len(result.per_landmark_K) == 14


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_heatmaps_of_mirrored_points_mirror_back_to_those_of_the_points(
    generator: np.random.Generator, scheme: LandmarkScheme
) -> None:
    order = torch.tensor(scheme.flip_order)
    points = torch.from_numpy(generator.uniform(4, SIDE - 5, (3, scheme.num_landmarks, 2))).float()
    mirrored = points[:, order] * torch.tensor([-1, 1]) + torch.tensor([SIDE - 1, 0])
    labelled = torch.ones(points.shape[:2], dtype=torch.bool)
    heatmaps = [
        gaussian_heatmaps(each, labelled, side=SIDE // 4, stride=4, sigma=1.0)
        for each in (points, mirrored)
    ]
    back = mirror_heatmaps(heatmaps[1], order)
    torch.testing.assert_close(back, heatmaps[0], atol=1e-5, rtol=0)
    mean = decode_heatmaps((heatmaps[0] + back) / 2, stride=4)
    torch.testing.assert_close(mean, points, atol=0.01, rtol=0)


def test_evaluation_takes_the_flip_test(tmp_path: Path, generator: np.random.Generator) -> None:
    found = picture_and_mirror(tmp_path, generator, FACE68)
    for annotation in found:
        annotation.points_K2[:] = generator.uniform(5, 60, (68, 2))
    faces = AnnotationSet(
        name="made", subset="test", scheme=FACE68, annotations=tuple(found), problems=()
    )
    crops = Crops(found, FACE68, size=SIDE)
    model = build_network(RunConfig().replace(model__unets=1, model__order=0), 68)
    plain, flipped = (evaluate(model, faces, crops, flip_test=each) for each in (False, True))
    assert plain.percent != flipped.percent
