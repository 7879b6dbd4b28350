"""The embedded set of people: its files, its bodies, and what `make_people` refuses."""

import dataclasses
import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fedcunet.data import load
from fedcunet.data.annotations import LSP14, MPII16, AnnotationSet, landmarks_in
from fedcunet.data.crops import Crops
from fedcunet.data.heatmaps import gaussian_heatmaps
from fedcunet.data.mpii_files import Person, read_places, read_release
from fedcunet.data.mpii_writer import ReleaseImage, write_places, write_release
from fedcunet.data.partition import partition
from fedcunet.data.procedural import make_people
from fedcunet.data.procedural.activities import CATEGORIES
from fedcunet.data.procedural.figure import figure_surfaces
from fedcunet.data.procedural.looks import sample_light
from fedcunet.data.procedural.outfits import sample_outfit
from fedcunet.data.procedural.poses import FAMILIES, sample_joints, sample_view
from fedcunet.data.procedural.render import Lens, lit_squares, paint_squares, seen_joints
from fedcunet.data.procedural.skeleton import Body, Build, pose_body, turn_y
from fedcunet.errors import UserError
from fedcunet.training.evaluation import evaluate

_MAT = "mpii_human_pose_v1_u12_1.mat"
# Bones between two joints that nothing may stretch; their lengths are those of the build.
_BONES = {
    "thigh": ((1, 2), (3, 4)),
    "shank": ((0, 1), (4, 5)),
    "upper_arm": ((11, 12), (13, 14)),
    "forearm": ((10, 11), (14, 15)),
    "neck": ((7, 8),),
    "head": ((8, 9),),
}


def _digest(root: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        total.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def small_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("procedural") / "people"
    make_people(root, num_train=110, num_test=20, seed=3)
    return root


@pytest.fixture(scope="module")
def everybody(small_root: Path) -> AnnotationSet:
    return load("people", small_root, "all")


def _body(family: str, seed: int, view: np.ndarray | None = None) -> Body:
    generator = np.random.default_rng(seed)
    root = sample_view(generator) if view is None else view
    return pose_body(Build(), sample_joints(FAMILIES[family], root, generator))


def test_the_mpii_reader_loads_the_set_without_complaint(small_root: Path) -> None:
    train, test = (load("people", small_root, subset) for subset in ("train", "test"))
    assert (len(train.annotations), len(test.annotations)) == (110, 20)
    assert train.problems == test.problems == ()
    assert train.scheme is MPII16
    assert {path.name for path in small_root.iterdir()} == {
        "images",
        _MAT,
        "detections.mat",
        "people.json",
    }


def test_no_photo_and_no_video_of_the_test_people_is_in_training(small_root: Path) -> None:
    train, test = (load("people", small_root, subset).annotations for subset in ("train", "test"))
    assert not {a.photo for a in train} & {a.photo for a in test}
    assert not {a.video for a in train} & {a.video for a in test}
    assert len({a.video for a in train}) < len({a.photo for a in train}) < len(train)


def test_the_official_file_keeps_every_place_and_fact_of_a_person(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    def person(image: str, missing: int) -> Person:
        labelled_K = np.arange(16) != missing
        points_K2 = np.where(labelled_K[:, None], generator.uniform(-20, 300, (16, 2)), 0.0)
        return Person(
            image=image,
            points_K2=points_K2,
            labelled_K=labelled_K,
            centre=(40.5, 60.25),
            scale=1.75,
            head_box=(10.0, 20.0, 31.0, 52.0),
            activity="rowing",
            category="water activities",
            video=2,
        )

    images = [
        ReleaseImage(name="1.jpg", people=[person("1.jpg", 16)], visible_PK=np.ones((1, 16), bool)),
        ReleaseImage(
            name="2.jpg",
            people=[person("2.jpg", 0), person("2.jpg", 5)],
            visible_PK=np.zeros((2, 16), bool),
        ),
    ]
    write_release(tmp_path / _MAT, images, videos=["a", "b"], activities=["rowing"])
    write_places(tmp_path / "detections.mat", [(2, 1), (2, 2)])
    read = read_release(tmp_path / _MAT)
    written = [person for image in images for person in image.people]
    for found, wanted in zip(read, written, strict=True):
        np.testing.assert_allclose(found.points_K2, wanted.points_K2, atol=1e-9)
        assert found.labelled_K.tolist() == wanted.labelled_K.tolist()
        for name in ("image", "centre", "scale", "head_box", "activity", "category", "video"):
            assert getattr(found, name) == getattr(wanted, name), name
    assert [person.place for person in read] == [(1, 1), (2, 1), (2, 2)]
    assert read_places(tmp_path / "detections.mat") == {(2, 1), (2, 2)}


def test_any_number_of_processes_gives_the_same_bytes_and_another_seed_other_ones(
    tmp_path: Path,
) -> None:
    for name, seed, processes in (("one", 5, 1), ("two", 5, 2), ("other", 6, 1)):
        make_people(tmp_path / name, num_train=9, num_test=3, seed=seed, processes=processes)
    assert _digest(tmp_path / "one") == _digest(tmp_path / "two")
    assert _digest(tmp_path / "one") != _digest(tmp_path / "other")


def test_labelled_joints_lie_inside_the_picture(everybody: AnnotationSet) -> None:
    for annotation in everybody.annotations:
        height, width = cv2.imread(str(annotation.image)).shape[:2]
        points = annotation.points_K2[annotation.labelled_K]
        assert (points >= -0.5).all()
        assert (points <= (width - 0.5, height - 0.5)).all()


def test_joints_are_missing_about_as_often_as_in_mpii(everybody: AnnotationSet) -> None:
    """MPII's validation people: ankles 28 %, knees 16 %, hips 2 to 3 %, others at most 1.7 %."""
    missing_K = 1 - np.mean([a.labelled_K for a in everybody.annotations], axis=0)
    ankles, knees = missing_K[[0, 5]].mean(), missing_K[[1, 4]].mean()
    assert 0.17 < ankles < 0.40
    assert 0.08 < knees < 0.26
    assert knees < ankles
    assert missing_K[[2, 3, 6]].max() < 0.1
    assert missing_K[[7, 8, 9, 10, 11, 12, 13, 14, 15]].max() < 0.06


def test_head_sizes_follow_the_relations_measured_on_mpii(everybody: AnnotationSet) -> None:
    """0.6 x diagonal of the rectangle = 0.75 x head length = 25 x scale; box side 200 x scale."""
    for annotation in everybody.annotations:
        length = np.linalg.norm(annotation.points_K2[9] - annotation.points_K2[8])
        assert annotation.head_size == pytest.approx(0.75 * length)
        assert annotation.box_xywh[2] == pytest.approx(8 * annotation.head_size)


def test_clients_can_be_dealt_by_category_activity_and_video(everybody: AnnotationSet) -> None:
    people = everybody.annotations
    activities = {
        (category, name) for category, kind in CATEGORIES.items() for name, _ in kind.activities
    }
    assert {(a.category, a.activity) for a in people} <= activities
    parts = partition(people, num_clients=5, scheme="category", alpha=0.5, skew=0.0, seed=0)
    labels = [{people[index].category for index in part} for part in parts]
    assert sum(map(len, labels)) == len(set().union(*labels)) > 5  # whole categories
    for scheme in ("activity", "video"):
        assert len(partition(people, num_clients=5, scheme=scheme, alpha=1, skew=0, seed=0)) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_no_pose_stretches_a_bone_or_leaves_the_limits_of_a_joint(family: str) -> None:
    build = Build()
    for seed in range(20):
        points = _body(family, seed).points_K3
        for name, pairs in _BONES.items():
            for first, second in pairs:
                length = np.linalg.norm(points[first] - points[second])
                assert length == pytest.approx(getattr(build, name)), name
        joints = sample_joints(FAMILIES[family], np.eye(3), np.random.default_rng(seed))
        for angles in (joints.knee, joints.elbow):
            assert (angles >= 0).all()
            assert (angles <= np.radians(150)).all()


def test_the_left_side_is_right_in_the_picture_from_the_front_and_left_from_behind() -> None:
    left, right = [3, 4, 5, 13, 14, 15], [2, 1, 0, 12, 11, 10]
    for seed in range(20):
        front = _body("stand", seed, np.eye(3)).points_K3
        behind = _body("stand", seed, turn_y(np.pi)).points_K3
        assert (front[[3, 13], 0] > front[[2, 12], 0]).all()
        assert (behind[[3, 13], 0] < behind[[2, 12], 0]).all()
        assert front[left, 0].mean() > front[right, 0].mean()
        assert behind[left, 0].mean() < behind[right, 0].mean()


def test_most_people_of_the_set_are_seen_from_the_front(everybody: AnnotationSet) -> None:
    """70 % in MPII: with the left shoulder at the right of the picture, as the torso stands."""
    points_NK2 = np.array([a.points_K2 for a in everybody.annotations])
    up, across = points_NK2[:, 7] - points_NK2[:, 6], points_NK2[:, 13] - points_NK2[:, 12]
    from_front = across[:, 0] * -up[:, 1] + across[:, 1] * up[:, 0] > 0
    assert 0.5 < from_front.mean() < 0.85


def test_a_face_is_seen_from_the_front_only() -> None:
    generator = np.random.default_rng(0)
    outfit, light = sample_outfit("hall", generator), sample_light(generator, hardness=0.5)
    lens = Lens(distance=10.0, scale=50.0, offset=np.zeros(2))
    counts = {}
    for name, view in (("front", np.eye(3)), ("behind", turn_y(np.pi))):
        head = [s for s in figure_surfaces(_body("stand", 1, view), outfit) if s.lift > 0]
        counts[name] = len(lit_squares(head, lens, light, generator).depth)
    assert counts["front"] >= 5  # eyes, brows, nose, mouth
    assert counts["behind"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_joint_lies_on_the_drawn_figure(family: str) -> None:
    generator = np.random.default_rng(1)
    outfit, light = sample_outfit("hall", generator), sample_light(generator, hardness=0.5)
    lens = Lens(distance=9.0, scale=60.0, offset=np.full(2, 256.0))
    for seed in range(3):
        body = _body(family, seed)
        squares = lit_squares(figure_surfaces(body, outfit), lens, light, generator)
        grounds = [np.full((512, 512, 3), value, np.uint8) for value in (0, 255)]
        for ground in grounds:
            paint_squares(ground, squares, soften=0.6)
        bare = np.abs(grounds[0].astype(int) - grounds[1]).max(axis=2) > 200
        x, y = np.rint(lens.project(body.points_K3)).astype(int).T
        assert not bare[y, x][[joint for joint in range(16) if joint != 9]].any()
        # The head's top is on its outline.
        assert not bare[y[9] - 4 : y[9] + 5, x[9] - 4 : x[9] + 5].all()


def test_a_shoulder_behind_the_body_is_hidden_and_the_near_one_is_seen() -> None:
    generator = np.random.default_rng(0)
    outfit, light = sample_outfit("hall", generator), sample_light(generator, hardness=0.5)
    lens = Lens(distance=12.0, scale=60.0, offset=np.zeros(2))
    body = _body("stand", 4, turn_y(np.pi / 2))  # looks to the right: the right side is near
    squares = lit_squares(figure_surfaces(body, outfit), lens, light, generator)
    seen_K = seen_joints(body.points_K3, squares, lens)
    assert seen_K[12]
    assert not seen_K[13]


def test_people_fill_their_crops_as_those_of_lsp_do(everybody: AnnotationSet) -> None:
    """LSP's crop is 1.5 times the box of the joints; complete people here are near that."""
    shares = []
    for annotation in everybody.annotations:
        if annotation.labelled_K.all():
            side = annotation.box_xywh[2] * MPII16.crop_factor
            shares.append(np.ptp(annotation.points_K2, axis=0).max() / side)
    assert np.median(shares) == pytest.approx(1 / LSP14.crop_factor, abs=0.08)


def test_lsp_takes_its_fourteen_joints_from_the_sixteen_of_mpii() -> None:
    joints = landmarks_in(MPII16, LSP14)
    assert joints is not None
    assert len(set(joints)) == 14
    # Mirroring before or after taking them is the same.
    mirrored = [MPII16.flip_order[joint] for joint in joints]
    assert mirrored == [joints[joint] for joint in LSP14.flip_order]
    assert joints[12:] == (8, 9)  # neck, head top
    assert landmarks_in(LSP14, MPII16) is None
    assert landmarks_in(LSP14, LSP14) == tuple(range(14))


class _Pointer(torch.nn.Module):
    """Points at the same 16 places in every crop."""

    supervisions = ("regression",)

    def __init__(self, points_K2: np.ndarray) -> None:
        super().__init__()
        self.points = torch.nn.Parameter(torch.tensor(points_K2, dtype=torch.float32))

    def forward(self, images_B3HW: torch.Tensor) -> list[torch.Tensor]:
        points_BK2 = self.points.expand(len(images_B3HW), -1, -1)
        labelled_BK = torch.ones(points_BK2.shape[:2], dtype=torch.bool)
        side = images_B3HW.shape[-1] // 4
        return [gaussian_heatmaps(points_BK2, labelled_BK, side=side, stride=4, sigma=1.0)]


def test_a_network_for_mpii_is_scored_on_the_same_joints_of_lsp(
    small_root: Path, everybody: AnnotationSet
) -> None:
    person = next(a for a in everybody.annotations if a.labelled_K.all())
    # Right side, left side, then neck and head top: the ids of MPII in LSP's order.
    ids = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 8, 9]
    athlete = dataclasses.replace(
        person, points_K2=person.points_K2[ids], labelled_K=np.ones(14, bool)
    )
    lsp = dataclasses.replace(everybody, scheme=LSP14, annotations=(athlete,))
    as_mpii, as_lsp = (
        Crops([found], scheme, size=64)
        for found, scheme in (
            (person, MPII16),
            (athlete, dataclasses.replace(LSP14, crop_factor=1.25)),
        )
    )
    model = _Pointer(as_mpii.targets()[0][0])
    joints = landmarks_in(MPII16, LSP14)
    assert evaluate(model, lsp, as_lsp, landmarks=joints).percent == 100
    assert joints is not None
    swapped = [*joints[3:6], *joints[:3], *joints[6:]]
    assert evaluate(model, lsp, as_lsp, landmarks=swapped).percent < 100


def test_a_second_call_writes_nothing_and_other_arguments_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "people"
    calls: list[tuple[int, int]] = []
    make_people(root, num_train=2, num_test=1, progress=lambda *done: calls.append(done))
    assert calls[-1] == (3, 3)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    make_people(root, num_train=2, num_test=1)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    with pytest.raises(UserError, match=r"seed 1.*found.*seed 0"):
        make_people(root, num_train=2, num_test=1, seed=1)


def test_an_interrupted_set_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_people(tmp_path / "people", num_train=2, num_test=1, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [{"num_train": 0}, {"num_test": 0}, {"seed": -1}, {"processes": 0}])
def test_impossible_counts_are_refused(tmp_path: Path, bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(bad))} must be at least"):
        make_people(tmp_path / "people", **bad)  # type: ignore[arg-type]
