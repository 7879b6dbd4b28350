"""The data commands, called as the command line calls them."""

import json
from pathlib import Path
from typing import Any

import cv2
import pytest
from typer.testing import CliRunner, Result

from fedcunet.commands.data import app
from fedcunet.errors import RunFailure, UserError


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
    report = json.loads(result.stdout)
    assert len(report["unreadable"]) == 1
    assert "2_1.jpg" in report["unreadable"][0]
    assert any("image_001.pts: expected 68 points, found 1" in line for line in report["problems"])


def test_check_of_a_wrong_folder_or_kind_is_wrong_use(tmp_path: Path) -> None:
    for arguments in ((tmp_path,), (tmp_path, "--data", "lsp"), (tmp_path, "--data", "coco")):
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
def test_partition_says_what_each_client_holds(make_300w, scheme: str) -> None:
    names = [f"{photo}_{face}.jpg" for photo in range(6) for face in (1, 2)]
    root = make_300w({"afw": names, "lfpw/trainset": ["image_0001.png", "image_0002.png"]})
    result = _run("partition", root, "--num-clients", 4, "--scheme", scheme, "--json")
    rows = json.loads(result.stdout)
    assert [row["client"] for row in rows] == [0, 1, 2, 3]
    assert sum(row["images"] for row in rows) == 14
    assert sum(row["photos"] for row in rows) == 8
    assert all(sum(row["sources"].values()) == row["images"] for row in rows)
