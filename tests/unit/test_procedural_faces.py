"""The embedded face set: its files, its geometry, and what `make_faces` refuses."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from fedcunet.data.annotations import FACE68
from fedcunet.data.procedural import make_faces
from fedcunet.data.procedural.landmarks import points_3d, posed_points, rotation
from fedcunet.data.procedural.shape import FaceShape, sample_shape
from fedcunet.errors import UserError

_FOLDERS = {"afw", "helen/trainset", "helen/testset", "lfpw/trainset", "lfpw/testset", "ibug"}


def _read_pts(path: Path) -> np.ndarray:
    lines = path.read_text(encoding="ascii").splitlines()
    assert lines[:3] == ["version: 1", "n_points:  68", "{"]
    assert lines[-1] == "}"
    return np.array([[float(word) for word in line.split()] for line in lines[3:-1]])


def _digest(root: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        total.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    root = tmp_path_factory.mktemp("procedural") / "faces"
    return root, make_faces(root, num_train=20, num_test=10, seed=3)


def test_the_counts_are_the_files_of_the_official_folders(
    small_set: tuple[Path, dict[str, int]],
) -> None:
    root, counts = small_set
    assert set(counts) == _FOLDERS
    for folder, count in counts.items():
        assert len(list((root / folder).glob("*.pts"))) == count
        suffix = ".png" if folder.startswith("lfpw") else ".jpg"
        assert len(list((root / folder).glob(f"*{suffix}"))) == count
    train = counts["afw"] + counts["helen/trainset"] + counts["lfpw/trainset"]
    assert (train, sum(counts.values())) == (20, 30)
    assert json.loads((root / "faces.json").read_text())["counts"] == counts


def test_every_face_has_68_points_inside_its_picture(
    small_set: tuple[Path, dict[str, int]],
) -> None:
    root, _ = small_set
    for path in root.rglob("*.pts"):
        points = _read_pts(path)
        image = next(p for p in (path.with_suffix(".jpg"), path.with_suffix(".png")) if p.exists())
        height, width = cv2.imread(str(image)).shape[:2]
        assert points.shape == (68, 2)
        assert points.min() >= 1.0  # the files count from 1
        assert (points <= (width, height)).all()
        share = np.ptp(points, axis=0).max() / width
        assert 0.3 < share < 0.65


def test_the_eye_of_point_36_is_left_in_the_picture(
    small_set: tuple[Path, dict[str, int]],
) -> None:
    for path in small_set[0].rglob("*.pts"):
        points = _read_pts(path)
        assert points[36:42, 0].mean() < points[42:48, 0].mean()
        assert points[48, 0] < points[54, 0]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_ones(
    small_set: tuple[Path, dict[str, int]], tmp_path: Path
) -> None:
    make_faces(tmp_path / "again", num_train=20, num_test=10, seed=3)
    make_faces(tmp_path / "other", num_train=20, num_test=10, seed=4)
    assert _digest(tmp_path / "again") == _digest(small_set[0])
    assert _digest(tmp_path / "other") != _digest(small_set[0])


def test_the_300w_reader_loads_the_set_without_complaint(
    small_set: tuple[Path, dict[str, int]],
) -> None:
    from fedcunet.data import load

    train, test = (load("faces", small_set[0], subset) for subset in ("train", "test"))
    assert (len(train.annotations), len(test.annotations)) == (20, 10)
    assert train.problems == ()
    assert test.problems == ()
    assert not {a.photo for a in train.annotations} & {a.photo for a in test.annotations}


def test_some_photos_show_several_faces(tmp_path: Path) -> None:
    counts = make_faces(tmp_path / "faces", num_train=40, num_test=3)
    stems = [path.stem for path in (tmp_path / "faces" / "afw").glob("*.pts")]
    assert len({stem.rsplit("_", 1)[0] for stem in stems}) < counts["afw"]


def test_a_second_call_writes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "faces"
    first = make_faces(root, num_train=3, num_test=3)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    calls: list[tuple[int, int]] = []
    again = make_faces(root, num_train=3, num_test=3, progress=lambda *done: calls.append(done))
    assert again == first
    assert calls == []
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["faces"]


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    make_faces(tmp_path / "f", num_train=6, num_test=4, progress=lambda *done: calls.append(done))
    assert calls[-1] == (10, 10)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_an_interrupted_set_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_faces(tmp_path / "faces", num_train=3, num_test=3, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_another_seed_or_count_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "faces"
    make_faces(root, num_train=3, num_test=3)
    with pytest.raises(UserError, match=r"seed 1.*found.*seed 0"):
        make_faces(root, num_train=3, num_test=3, seed=1)
    with pytest.raises(UserError, match=r"num_train 4.*found.*num_train 3"):
        make_faces(root, num_train=4, num_test=3)


def test_a_foreign_folder_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="found other files"):
        make_faces(tmp_path, num_train=3, num_test=3)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="found a file"):
        make_faces(tmp_path / "mine.txt", num_train=3, num_test=3)


@pytest.mark.parametrize("bad", [{"num_train": 2}, {"num_test": 0}, {"seed": -1}])
def test_impossible_counts_are_refused(tmp_path: Path, bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(bad))} must be at least"):
        make_faces(tmp_path / "faces", **bad)  # type: ignore[arg-type]


def test_an_even_face_seen_from_the_front_is_its_own_mirror_image() -> None:
    points = (posed_points(FaceShape(), 0.0, 0.0) @ rotation(0.0, 0.0, 0.0).T)[:, :2]
    mirrored = points[list(FACE68.flip_order)] * (-1, 1)
    np.testing.assert_allclose(mirrored, points, atol=1e-12)


def test_seen_from_the_front_the_jaw_points_are_the_jaw_itself() -> None:
    shape = FaceShape()
    np.testing.assert_allclose(posed_points(shape, 0.0, 0.0), points_3d(shape), atol=1e-12)


@pytest.mark.parametrize("yaw", [-0.7, 0.7])
def test_on_a_turned_face_the_far_jaw_lies_on_the_visible_outline(yaw: float) -> None:
    shape = FaceShape()
    turn = rotation(yaw, 0.0, 0.0)
    seen = posed_points(shape, yaw, 0.0) @ turn.T
    hidden = points_3d(shape) @ turn.T
    # Turned to the right (yaw > 0), the right of the picture is the far side.
    far, sign = (range(10, 17), 1.0) if yaw > 0 else (range(7), -1.0)
    assert (sign * seen[far, 0] > sign * hidden[far, 0] + 0.01).all()
    near = [16 - index for index in far]
    np.testing.assert_allclose(seen[near], hidden[near], atol=0.05)


def test_sampled_shapes_keep_the_order_of_the_features() -> None:
    for seed in range(50):
        points = points_3d(sample_shape(np.random.default_rng(seed), expression=1.6))
        assert np.isfinite(points).all()
        brow, eye, nose, lip, chin = (
            points[i, 1].mean() for i in (slice(17, 27), slice(36, 48), 33, slice(48, 68), 8)
        )
        assert brow < eye < nose < lip < chin
        assert (points[[61, 62, 63], 1] < points[[67, 66, 65], 1]).all()  # lips do not cross
        assert points[30, 2] == points[27:48, 2].max()  # the tip of the nose stands out
