"""The data commands, called as the command line calls them."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from scipy.io import savemat
from typer.testing import CliRunner, Result

from fedcunet.commands.data import app
from fedcunet.data import load
from fedcunet.data.audit import audit
from fedcunet.data.kinds import detect_kind
from fedcunet.errors import RunFailure, UserError
from tests.mpii_files import image, joints, person, points, write_images, write_mat


def _run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_check_counts_each_folder_beside_its_official_size(make_300w) -> None:
    root = make_300w({"afw": ["1_1.jpg", "1_2.jpg"], "helen/testset": ["2_1.jpg"]})
    result = _run("check", root, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    parts = {
        row["part"]: (row["images"], row["photos"], row["official"]) for row in report["parts"]
    }
    assert parts["afw"] == (2, 1, 337)
    assert parts["helen/testset"] == (1, 1, 330)
    assert parts["ibug"] == (0, 0, 135)
    assert (report["images"], report["photos"], report["unreadable"]) == (3, 2, [])
    assert report["labelled_landmarks"] == 204
    assert report["landmarks_outside_image"] == 0


def test_check_fails_on_damaged_images_and_points_and_names_them(make_300w) -> None:
    root = make_300w({"afw": ["1_1.jpg", "2_1.jpg"], "ibug": ["image_001.jpg"]})
    image = root / "afw" / "2_1.jpg"
    image.write_bytes(image.read_bytes()[:-100])
    (root / "ibug" / "image_001.pts").write_text("1 2\n")
    result = _run("check", root, "--json")
    assert isinstance(result.exception, RunFailure)
    assert "1 unreadable images, 1 unreadable folders" in str(result.exception)
    image.write_bytes((root / "afw" / "1_1.jpg").read_bytes())
    said = str(_run("check", root).exception)
    assert "1 unreadable folders" in said
    assert "image_001.pts: expected 68 points, found 1" in said
    report = json.loads(result.stdout)
    assert len(report["unreadable"]) == 1
    assert "2_1.jpg" in report["unreadable"][0]
    assert any("image_001.pts: expected 68 points, found 1" in line for line in report["problems"])


def test_check_of_a_wrong_folder_or_kind_is_wrong_use(tmp_path: Path) -> None:
    for arguments in (
        (tmp_path,),
        (tmp_path / "absent",),
        (tmp_path, "--data", "lsp"),
        (tmp_path, "--data", "coco"),
    ):
        assert isinstance(_run("check", *arguments).exception, UserError)


def test_show_writes_a_sheet_of_crops(make_300w, tmp_path: Path) -> None:
    root = make_300w({"afw": ["1_1.jpg", "2_1.jpg", "3_1.jpg"]})
    out = tmp_path / "made" / "sheet.png"
    result = _run("show", root, "--subset", "afw", "--out", out, "--size", 32, "--augment")
    assert result.exit_code == 0
    assert cv2.imread(str(out)).shape == (192, 3 * 192, 3)
    assert [path.name for path in out.parent.iterdir()] == ["sheet.png"]
    assert isinstance(_run("show", root, "--out", tmp_path / "sheet.txt").exception, UserError)


@pytest.mark.parametrize("scheme", ["iid", "source", "dirichlet"])
def test_partition_says_what_each_client_holds(make_300w, tmp_path: Path, scheme: str) -> None:
    names = [f"{photo}_{face}.jpg" for photo in range(6) for face in (1, 2)]
    root = make_300w({"afw": names, "lfpw/trainset": ["image_0001.png", "image_0002.png"]})
    result = _run("partition", root, "--num-clients", 4, "--scheme", scheme, "--json")
    rows = json.loads(result.stdout)
    assert [row["client"] for row in rows] == [0, 1, 2, 3]
    assert sum(row["images"] for row in rows) == 14
    assert sum(row["photos"] for row in rows) == 8
    assert all(sum(row["sources"].values()) == row["images"] for row in rows)
    assert all(row["visibility"]["eyes"] == 1 for row in rows)
    picture = tmp_path / "made" / "parts.png"
    result = _run("partition", root, "--num-clients", 4, "--scheme", scheme, "--out", picture)
    assert "labelled" not in result.stdout  # every landmark is: nothing to say
    assert cv2.imread(str(picture)).shape[1] > 1000
    assert [path.name for path in picture.parent.iterdir()] == ["parts.png"]
    wrong = _run("partition", root, "--num-clients", 4, "--out", tmp_path / "parts.txt")
    assert isinstance(wrong.exception, UserError)
    wrong = _run("partition", root, "--num-clients", 4, "--scheme", "place")
    assert isinstance(wrong.exception, UserError)
    useless = _run("partition", root, "--num-clients", 4, "--scheme", scheme, "--label", "source")
    assert f"--label has no effect with --scheme {scheme}" in useless.stderr


def _people(tmp_path: Path, count: int) -> Path:
    """An MPII folder of so many people: five activities, every third one without ankles."""
    pictures, acts = [], []
    for number in range(count):
        name = f"{number:09d}.jpg"
        places = {k: xy for k, xy in joints().items() if number % 3 or k not in (0, 5)}
        pictures.append(image(name, person(annopoints=points(places)), vidx=1.0))
        acts.append(
            {"cat_name": f"kind {number % 5 % 2}", "act_name": f"act {number % 5}", "act_id": 1.0}
        )
    names = [picture["image"]["name"] for picture in pictures]
    root = write_images(tmp_path / "mpii", names)
    write_mat(root / "mpii_human_pose_v1_u12_1.mat", pictures, acts=acts)
    return root


def test_partition_of_people_says_activities_and_labelled_joints(tmp_path: Path) -> None:
    root = _people(tmp_path, 100)
    arguments = ("partition", root, "--num-clients", 5, "--scheme", "activity", "--subset", "all")
    rows = json.loads(_run(*arguments, "--validation-fraction", 0.2, "--json").stdout)
    assert [len(row["activities"]) for row in rows] == [1] * 5
    assert sum(sum(row["categories"].values()) for row in rows) == 100
    assert [row["validation_images"] for row in rows] == [4] * 5
    for row in rows:
        assert row["visibility"]["ankles"] == pytest.approx(2 / 3, abs=0.05)
        assert row["visibility"]["knees"] == 1
    shown = _run(*arguments).stdout
    assert "act 3" in shown
    assert "ankles" in shown
    assert "knees" not in shown


def test_partition_on_many_clients_shows_quantiles_and_a_map(tmp_path: Path) -> None:
    root = _people(tmp_path, 100)
    out = tmp_path / "many.png"
    result = _run(
        "partition", root, "--num-clients", 60, "--subset", "all", "--sizes", "mpii-activities",
        "--scheme", "dirichlet-visibility", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0
    assert "median" in result.stdout
    assert len(result.stdout.splitlines()) < 30
    assert cv2.imread(str(out)).shape[0] > 500


@pytest.mark.parametrize("kind", ["300w", "faces", "lsp", "lspet", "mpii"])
def test_the_kind_of_a_data_set_is_told_by_its_files(make_300w, tmp_path: Path, kind: str) -> None:
    if kind in ("300w", "faces"):
        root = make_300w({"afw": ["1_1.jpg"]})
        if kind == "faces":
            (root / "faces.json").write_text("{}")
    elif kind == "mpii":
        root = _people(tmp_path, 1)
    else:
        root = tmp_path / kind
        root.mkdir()
        savemat(
            root / "joints.mat", {"joints": np.ones((3, 14, 2) if kind == "lsp" else (14, 3, 2))}
        )
    assert detect_kind(root) == kind
    with pytest.raises(UserError, match=f"found none; below it are {root.name}$"):
        detect_kind(root.parent)


def test_a_folder_of_two_data_sets_needs_its_kind_said(make_300w) -> None:
    root = make_300w({"afw": ["1_1.jpg"]})
    savemat(root / "joints.mat", {"joints": np.ones((14, 3, 2))})
    with pytest.raises(UserError, match="holds files of 300w and lspet; say which with --data"):
        detect_kind(root)
    assert json.loads(_run("check", root, "--data", "300w", "--json").stdout)["data"] == "300w"


def test_check_adds_up_the_subsets_beside_their_official_size(make_300w) -> None:
    root = make_300w(
        {
            "afw": ["1_1.jpg"],
            "lfpw/trainset": ["image_0001.png", "image_0003.png"],
            "lfpw/testset": ["image_0009.png"],
            "ibug": ["image_003_1.jpg"],
            "Test/02_Outdoor": ["outdoor_001.png"],
        }
    )
    report = json.loads(_run("check", root, "--json").stdout)
    subsets = {row["subset"]: (row["images"], row["official"]) for row in report["subsets"]}
    assert subsets == {
        "train": (3, 3148),
        "common": (1, 554),
        "challenge": (1, 135),
        "full": (2, 689),
        "private": (1, 600),
    }
    assert "helen/trainset: not there" in report["problems"]
    assert report["odd"] == []


def test_check_finds_odd_annotations_and_says_what_to_do(make_300w) -> None:
    names = [f"{n}_1.jpg" for n in range(1, 6)]
    root = make_300w({"afw": names, "helen/testset": ["7_1.jpg"]})
    afw = root / "afw"
    _change_points(afw / "1_1.pts", {5: (900, 20)})
    _change_points(afw / "2_1.pts", dict.fromkeys(range(68), (9, 9)))
    lines = (afw / "3_1.pts").read_text().splitlines()
    _change_points(afw / "3_1.pts", {9: tuple(map(float, lines[3].split()))})
    (afw / "4_1.pts").write_text((afw / "5_1.pts").read_text())
    (afw / "5_1.jpg").write_bytes((root / "helen/testset" / "7_1.jpg").read_bytes())
    result = _run("check", root, "--json")
    found = {row["kind"]: row for row in json.loads(result.stdout)["odd"]}
    assert found["far-outside"]["examples"] == ["afw/1_1.jpg: landmark 6 is 852 pixels outside"]
    assert found["empty-box"]["examples"] == ["afw/2_1.jpg: box 8, 8, 0, 0"]
    assert found["same-place"]["examples"][-1] == "afw/3_1.jpg: landmarks 1 and 10"
    assert found["same-points"]["examples"] == ["afw/5_1.jpg = afw/4_1.jpg"]
    assert found["leak"]["examples"] == ["helen/testset/7_1.jpg = afw/5_1.jpg"]
    assert "remove them from training" in found["leak"]["text"]
    assert "remove them from training" in _run("check", root).stdout


def test_check_finds_images_of_training_in_the_private_test(make_300w) -> None:
    root = make_300w({"afw": ["1_1.jpg"], "300W/01_Indoor": ["indoor_001.jpg"]})
    copy = root / "300W/01_Indoor" / "indoor_001.jpg"
    copy.write_bytes((root / "afw" / "1_1.jpg").read_bytes())
    odd = json.loads(_run("check", root, "--json").stdout)["odd"]
    assert [row["kind"] for row in odd] == ["leak"]


def test_a_photo_on_both_sides_is_a_leak(make_300w) -> None:
    root = make_300w({"afw": ["1_1.jpg"]})
    faces = load("300w", root, "afw").annotations
    found = audit({"train": faces, "test": faces}, test_parts=("test",)).findings
    assert found["leak"].examples == ["afw/1_1.jpg = afw/1_1.jpg"]


def test_closed_lips_and_eyes_and_several_faces_of_a_photo_are_not_odd(make_300w) -> None:
    root = make_300w({"afw": ["1_1.jpg", "1_2.jpg"]})
    pts = root / "afw" / "1_1.pts"
    lines = pts.read_text().splitlines()
    _change_points(pts, {66: tuple(map(float, lines[3 + 62].split()))})
    (root / "afw" / "1_2.jpg").write_bytes((root / "afw" / "1_1.jpg").read_bytes())
    assert json.loads(_run("check", root, "--json").stdout)["odd"] == []


def _change_points(path: Path, places: dict[int, tuple[float, ...]]) -> None:
    """Puts some points (0-based numbers) of a .pts file elsewhere (1-based pixels)."""
    lines = path.read_text().splitlines()
    for number, (x, y) in places.items():
        lines[3 + number] = f"{x} {y}"
    path.write_text("\n".join(lines) + "\n")
