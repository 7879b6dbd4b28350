"""Crops: geometry, augmentation, cache and damaged files."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fedcunet.data import FACE68, Annotation, LandmarkScheme, load
from fedcunet.data.affine import apply_affine, invert_affine
from fedcunet.data.augmentation import Augmentation
from fedcunet.data.crops import Crops, CropSubset, crop_square
from fedcunet.data.images import read_image
from fedcunet.errors import UserError

# Landmarks 0 and 1 change places in a mirror, 2 stays.
_SPOTS = LandmarkScheme(
    name="spots", num_landmarks=3, flip_pairs=((0, 1),), metric="pck", lines=(), crop_factor=1.25
)
_COLOURS = ((255, 40, 40), (40, 255, 40), (40, 40, 255))


def _spots(
    tmp_path: Path, *, side: int = 200, box: tuple[float, float, float, float] | None = None
) -> Annotation:
    """Three blurred spots, red, green and blue, whose centres are the landmarks."""
    points_K2 = np.array([[0.38, 0.42], [0.63, 0.4], [0.52, 0.61]]) * side
    y, x = np.mgrid[:side, :side]
    image_HW3 = np.zeros((side, side, 3))
    for point, colour in zip(points_K2, _COLOURS, strict=True):
        spot = np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / (2 * (side / 40) ** 2))
        image_HW3 += spot[:, :, None] * np.array(colour)
    path = tmp_path / "spots.png"
    cv2.imwrite(str(path), image_HW3.clip(0, 255).round().astype(np.uint8)[:, :, ::-1])
    return Annotation(
        image=path,
        points_K2=points_K2,
        labelled_K=np.array([True, True, False]),
        box_xywh=box or (0.3 * side, 0.3 * side, 0.4 * side, 0.4 * side),
        box_origin="landmarks",
        source="made",
        photo="made/spots",
    )


def _spot_centre(image_3HW: torch.Tensor, channel: int) -> np.ndarray:
    """Centroid (x, y) of the spot of one colour."""
    others = image_3HW[[c for c in range(3) if c != channel]].amax(dim=0)
    mass = (image_3HW[channel] - others).clamp(min=0).double() ** 2
    grid = torch.arange(image_3HW.shape[1], dtype=torch.float64)
    centre = torch.stack([(mass * grid).sum(), (mass * grid[:, None]).sum()]) / mass.sum()
    return centre.numpy()


def test_plain_crop_is_the_box_times_the_crop_factor(tmp_path: Path) -> None:
    annotation = _spots(tmp_path, box=(40, 60, 80, 40))
    centre, side = crop_square(annotation, _SPOTS)
    assert (tuple(centre), side) == ((80, 80), 100)
    batch = Crops([annotation], _SPOTS, size=50).batch([0])
    # Two image pixels per crop pixel: crop pixel 0 is centred on image (30 - 0.5) + 1.
    np.testing.assert_allclose(batch.to_image_B23[0], [[2, 0, 31], [0, 2, 31]])
    np.testing.assert_allclose(batch.points_BK2[0], (annotation.points_K2 - 31) / 2, atol=1e-5)
    assert batch.labelled_BK.tolist() == [[True, True, False]]


def test_a_crop_at_the_images_own_scale_repeats_its_pixels(tmp_path: Path) -> None:
    annotation = _spots(tmp_path, box=(59.5, 59.5, 64, 64))
    batch = Crops([annotation], _SPOTS, size=80).batch([0])
    image_HW3 = read_image(annotation.image)
    expected = torch.from_numpy(image_HW3[52:132, 52:132]).permute(2, 0, 1) / 255
    torch.testing.assert_close(batch.images_B3HW[0], expected, rtol=0, atol=1e-6)
    assert batch.images_B3HW.dtype == torch.float32


@pytest.mark.parametrize("side", [64, 200, 900], ids=["magnified", "even", "shrunk"])
def test_landmarks_stay_on_their_spots_through_every_augmentation(
    tmp_path: Path, generator: np.random.Generator, side: int
) -> None:
    annotation = _spots(tmp_path, side=side)
    crops = Crops([annotation], _SPOTS, size=64)
    augmentation = Augmentation(flip=True, colour=0.0)
    batch = crops.batch([0] * 24, augmentation=augmentation, generator=generator)
    mirrored = np.linalg.det(batch.to_image_B23[:, :, :2]) < 0
    assert 0 < mirrored.sum() < 24
    for image, points, mirror in zip(batch.images_B3HW, batch.points_BK2, mirrored, strict=True):
        for landmark in range(3):
            channel = [1, 0, 2][landmark] if mirror else landmark
            assert np.abs(_spot_centre(image, channel) - points[landmark].numpy()).max() < 0.25


def test_labels_are_mirrored_with_their_landmarks(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    annotation = _spots(tmp_path)
    annotation.labelled_K[:] = (True, False, True)
    crops = Crops([annotation], _SPOTS, size=32)
    batch = crops.batch([0] * 20, augmentation=Augmentation(flip=True), generator=generator)
    mirrored = np.linalg.det(batch.to_image_B23[:, :, :2]) < 0
    for labelled, mirror in zip(batch.labelled_BK.tolist(), mirrored, strict=True):
        assert labelled == ([False, True, True] if mirror else [True, False, True])


def test_points_map_back_to_the_image(tmp_path: Path, generator: np.random.Generator) -> None:
    annotation = _spots(tmp_path)
    crops = Crops([annotation], _SPOTS, size=64)
    batch = crops.batch([0] * 8, augmentation=Augmentation(), generator=generator)
    back = apply_affine(batch.to_image_B23, batch.points_BK2.numpy().astype(np.float64))
    np.testing.assert_allclose(back, np.broadcast_to(annotation.points_K2, back.shape), atol=1e-3)
    there = apply_affine(invert_affine(batch.to_image_B23), back)
    np.testing.assert_allclose(there, batch.points_BK2, atol=1e-4)


def test_scale_rotation_and_colour_cover_their_ranges_and_stay_inside(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    path = tmp_path / "grey.png"
    cv2.imwrite(str(path), np.full((100, 100, 3), 100, np.uint8))
    annotation = Annotation(
        image=path,
        points_K2=np.zeros((3, 2)),
        labelled_K=np.ones(3, dtype=bool),
        box_xywh=(40, 40, 16, 16),
        box_origin="landmarks",
        source="made",
        photo="made/grey",
    )
    crops = Crops([annotation], _SPOTS, size=16)
    batch = crops.batch([0] * 400, augmentation=Augmentation(), generator=generator)
    linear_B22 = batch.to_image_B23[:, :, :2]
    scale_B = np.sqrt(np.linalg.det(linear_B22)) / (20 / 16)
    degrees_B = np.degrees(np.arctan2(linear_B22[:, 1, 0], linear_B22[:, 0, 0]))
    colour_B3 = batch.images_B3HW.amax(dim=(2, 3)).numpy() * 255 / 100
    for values, low, high in ((scale_B, 0.75, 1.25), (degrees_B, -30, 30), (colour_B3, 0.6, 1.4)):
        assert low - 1e-6 <= values.min() < low + 0.03 * (high - low)
        assert high - 0.03 * (high - low) < values.max() <= high + 1e-6
    assert np.corrcoef(colour_B3.T)[0, 1] < 0.2  # a factor for each channel of its own
    # The picture is large enough for every crop: no black comes in from the kept part's border.
    assert (batch.images_B3HW.amin(dim=(2, 3)).numpy() * 255 / 100 > 0.59).all()


def test_colours_are_clipped_at_white(tmp_path: Path, generator: np.random.Generator) -> None:
    annotation = _spots(tmp_path)
    augmentation = Augmentation(scale=(1, 1), rotation_degrees=0, colour=1.0)
    batch = Crops([annotation], _SPOTS, size=64).batch(
        [0] * 8, augmentation=augmentation, generator=generator
    )
    assert batch.images_B3HW.max() == 1.0
    assert batch.images_B3HW.min() >= 0.0


def test_the_part_of_a_crop_outside_the_image_is_black(tmp_path: Path) -> None:
    path = tmp_path / "white.png"
    cv2.imwrite(str(path), np.full((40, 40, 3), 255, np.uint8))
    for box, white in (((-20, 0, 40, 40), 0.5), ((400, 400, 40, 40), 0.0)):
        annotation = Annotation(
            image=path,
            points_K2=np.zeros((3, 2)),
            labelled_K=np.ones(3, dtype=bool),
            box_xywh=(box[0] - 0.5, box[1] - 0.5, box[2], box[3]),
            box_origin="image",
            source="made",
            photo="made/white",
        )
        image_3HW = Crops([annotation], _SPOTS, size=40).batch([0]).images_B3HW[0]
        assert image_3HW.mean() == pytest.approx(white, abs=1e-6)


def test_same_generator_state_gives_the_same_batch_and_order_follows_indices(
    make_300w, seed: int
) -> None:
    faces = load("300w", make_300w({"afw": ["1_1.png", "2_1.png", "3_1.png"]}), "afw")
    crops = Crops(faces.annotations, FACE68, size=32)
    assert len(crops) == 3
    one, two = (
        crops.batch([2, 0, 2], augmentation=Augmentation(), generator=np.random.default_rng(seed))
        for _ in range(2)
    )
    assert torch.equal(one.images_B3HW, two.images_B3HW)
    assert torch.equal(one.points_BK2, two.points_BK2)
    plain = crops.batch([2, 0, 2])
    assert torch.equal(plain.images_B3HW[0], plain.images_B3HW[2])
    assert torch.equal(plain.images_B3HW[1], crops.batch([0]).images_B3HW[0])
    assert crops.batch([]).images_B3HW.shape == (0, 3, 32, 32)


def test_images_are_decoded_once_within_the_budget_and_again_beyond_it(make_300w) -> None:
    faces = load("300w", make_300w({"afw": ["1_1.png", "2_1.png", "3_1.png"]}), "afw")
    ample = Crops(faces.annotations, FACE68, size=32)
    first = ample.batch([0, 1, 2])
    ample.batch([0, 1, 2])
    assert ample.num_decoded == 3
    small = Crops(faces.annotations, FACE68, size=32, budget_bytes=ample.cached_bytes // 2)
    small.batch([0, 1, 2])
    again = small.batch([0, 1, 2])
    assert small.num_decoded > 3
    assert small.cached_bytes <= ample.cached_bytes // 2
    assert torch.equal(first.images_B3HW, again.images_B3HW)


def test_kept_pixels_are_at_most_twice_as_fine_as_the_crop(tmp_path: Path) -> None:
    crops = Crops([_spots(tmp_path, side=900)], _SPOTS, size=32)
    crops.batch([0])
    # The crop's side is 450 image pixels = 64 kept ones, and the whole image is 128 of them.
    assert crops.cached_bytes <= 129 * 129 * 3


@pytest.mark.parametrize("extension", [".jpg", ".png"])
def test_images_cut_off_are_refused_by_name(
    tmp_path: Path,
    extension: str,
    generator: np.random.Generator,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _, data = cv2.imencode(extension, generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = tmp_path / f"face{extension}"
    for length in (0, 3, len(data) // 2, len(data) - 20):
        path.write_bytes(data.tobytes()[:length])
        with pytest.raises(UserError, match=rf"face\{extension}: expected") as caught:
            read_image(path)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_jpeg_cut_off_after_its_thumbnail_is_noticed(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    _, encoded = cv2.imencode(".jpg", generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded.tobytes()
    thumbnail = b"\xff\xe1" + (8).to_bytes(2, "big") + b"\xff\xd8\xff\xd9ab"
    path = tmp_path / "face.jpg"
    path.write_bytes(data[:2] + thumbnail + data[2:])
    assert read_image(path).shape == (64, 64, 3)
    path.write_bytes((data[:2] + thumbnail + data[2:])[:-100])
    with pytest.raises(UserError, match="damaged one"):
        read_image(path)


def test_missing_and_undecodable_images_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jpg: image cannot be read"):
        read_image(tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(UserError, match=r"text\.jpg: expected an image"):
        read_image(tmp_path / "text.jpg")


def test_images_are_rgb_in_stored_orientation(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    cv2.imwrite(str(path), np.full((4, 8, 3), (0, 0, 200), np.uint8))
    image_HW3 = read_image(path)
    assert image_HW3.shape == (4, 8, 3)
    assert (image_HW3 == (200, 0, 0)).all()


def test_targets_are_the_points_of_plain_crops_and_decode_nothing(make_300w) -> None:
    faces = load("300w", make_300w({"afw": ["1_1.png", "2_1.png"]}), "afw")
    crops = Crops(faces.annotations, FACE68, size=32)
    points_NK2, labelled_NK = crops.targets()
    assert crops.num_decoded == 0
    batch = crops.batch([0, 1])
    np.testing.assert_allclose(points_NK2, batch.points_BK2, atol=1e-4)
    assert (labelled_NK == batch.labelled_BK.numpy()).all()


def test_a_subset_has_indices_of_its_own(make_300w) -> None:
    faces = load("300w", make_300w({"afw": ["1_1.png", "2_1.png", "3_1.png"]}), "afw")
    crops = Crops(faces.annotations, FACE68, size=32)
    subset = CropSubset(crops, [2, 0])
    assert len(subset) == 2
    expected = crops.batch([0, 2, 2])
    assert torch.equal(subset.batch([1, 0, 0]).images_B3HW, expected.images_B3HW)


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    annotation = _spots(tmp_path)
    crops = Crops([annotation], _SPOTS, size=32)
    with pytest.raises(ValueError, match="needs a generator"):
        crops.batch([0], augmentation=Augmentation())
    with pytest.raises(UserError, match="expected 68 landmarks for face68"):
        Crops([annotation], FACE68, size=32)
    with pytest.raises(UserError, match="expected a box with an area"):
        Crops([_spots(tmp_path, box=(1, 1, 0, 0))], _SPOTS, size=32)
    for wrong in ({"scale": (0.5, 2.0)}, {"rotation_degrees": 45.0}, {"colour": -0.1}):
        with pytest.raises(UserError, match="augmentation"):
            Augmentation(**wrong)


def test_predicting_the_mean_face_gives_the_known_error(data_root: Path) -> None:
    def normalised(subset: str) -> np.ndarray:
        faces = load("300w", data_root / "300w", subset)
        crops = Crops(faces.annotations, faces.scheme, size=64)
        squares = [crop_square(a, faces.scheme) for a in faces.annotations]
        assert len(crops) == len(squares)
        return np.array(
            [
                (a.points_K2 - centre) / side
                for a, (centre, side) in zip(faces.annotations, squares, strict=True)
            ]
        )

    from fedcunet.metrics import nme_percent

    mean_K2, test_BK2 = normalised("train").mean(axis=0), normalised("helen/testset")
    error = nme_percent(np.broadcast_to(mean_K2, test_BK2.shape), test_BK2)
    assert error == pytest.approx(17.9, abs=0.1)
