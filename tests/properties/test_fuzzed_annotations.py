"""Damaged annotation files: one line of explanation each, and never a wrong point.

A changed digit cannot be noticed. So every mutated file that is still accepted is read a second
time by a plain reader written for this test, and both must agree on every labelled point.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcunet.data.mpii_files import Person, read_json, read_release
from fedcunet.data.w300 import read_pts
from fedcunet.errors import UserError
from tests.conftest import pts_text
from tests.mpii_files import cpm_record, hrnet_record, image, joints, person, points, write_mat

Places = list[tuple[str, dict[int, tuple[float, float]]]]

_MUTATIONS = 75  # of each kind of file
_ODD_VALUES: tuple[Any, ...] = (
    None, True, "", "1", "x" * 200, -1, 0, 2, 10**30, 1e-300, float("nan"), float("inf"),
    [], {}, [[]], [1, 2], [None] * 16, {"image": 1},
)  # fmt: skip
_MAX_CHANGES = 3  # in one file
_ODD_BYTES = b'\x00\xff 0-.,:{}[]"\ne_'


def mutated_bytes(data: bytes, generator: np.random.Generator) -> bytes:
    """One to three cuts, insertions, repeats or changed bytes."""
    for _ in range(generator.integers(1, _MAX_CHANGES + 1)):
        at = int(generator.integers(len(data))) if data else 0
        length = int(generator.integers(1, 40))
        kind = generator.integers(6)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + data[at + length :]
        elif kind == 2:
            data = data[: at + length] + data[at:]
        elif kind == 3:
            odd = bytes([_ODD_BYTES[generator.integers(len(_ODD_BYTES))]])
            data = data[:at] + odd + data[at + 1 :]
        elif kind == 4:
            data = data[:at] + generator.bytes(int(generator.integers(1, 5))) + data[at:]
        else:
            data = data[:at] + generator.bytes(1) + data[at + 1 :]
    return data


def mutated_json(text: bytes, generator: np.random.Generator) -> bytes:
    """One value anywhere in the tree removed, or replaced by an odd one."""
    tree = json.loads(text)
    node, path = tree, []
    while isinstance(node, (list, dict)) and node and (not path or generator.random() < 0.8):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        path.append((node, keys[generator.integers(len(keys))]))
        node = node[path[-1][1]]
    parent, key = path[-1]
    if generator.random() < 0.25:
        del parent[key]
    else:
        parent[key] = _ODD_VALUES[generator.integers(len(_ODD_VALUES))]
    return json.dumps(tree).encode()


def places_of(people: list[Person]) -> Places:
    """File name and labelled 1-based points of each person."""
    return [
        (p.image, {int(k): tuple(p.points_K2[k] + 1) for k in np.flatnonzero(p.labelled_K)})
        for p in people
    ]


def plain_pts(data: bytes) -> np.ndarray:
    """All numbers of the file in order, whatever the lines, without a header's."""
    text = data.decode("utf-8-sig")
    lines = text.replace("{", "\n").replace("}", "\n").split("\n")
    words = " ".join(line for line in lines if ":" not in line).split()
    return np.array([float(word) for word in words]).reshape(-1, 2)


def plain_json(data: bytes) -> Places:
    """HRNet's and CPM's records, read without any check."""
    found = []
    for record in json.loads(data):
        if "joint_self" in record:
            if record.get("dataset") == "LEEDS":
                continue
            rows = record["joint_self"]
            found.append((record["img_paths"], {k: r[:2] for k, r in enumerate(rows) if any(r)}))
        else:
            rows, flags = record["joints"], record["joints_vis"]
            labelled = {k: r for k, r in enumerate(rows) if flags[k]}
            found.append((record["image"], labelled))
    return [(name, {k: (float(x), float(y)) for k, (x, y) in p.items()}) for name, p in found]


# scipy can end the process on a damaged file, so it reads in one of its own: RELEASE the way it is
# stored, nothing squeezed, structs as record arrays. A line for each file it comes through.
_PLAIN_MAT = """
import json, sys, warnings
from pathlib import Path
from scipy.io import loadmat
warnings.simplefilter("ignore")

def first(value):
    return value.ravel()[0]

def places(path):
    release = first(loadmat(path)["RELEASE"])
    found = []
    trains = release["img_train"].ravel()
    for record, train in zip(release["annolist"].ravel(), trains, strict=True):
        rectangles = record["annorect"]
        if train != 1 or rectangles.size == 0:
            continue
        name = str(first(first(record["image"])["name"]))
        for rectangle in rectangles.ravel():
            placed = {}
            has_points = "annopoints" in rectangles.dtype.names and rectangle["annopoints"].size
            if has_points and "point" in rectangle["annopoints"].dtype.names:
                for point in first(rectangle["annopoints"])["point"].ravel():
                    if all(point[key].size for key in ("id", "x", "y")):
                        place = (float(first(point["x"])), float(first(point["y"])))
                        placed.setdefault(int(first(point["id"])), []).append(place)
            found.append((name, {k: v[0] for k, v in placed.items() if len(set(v)) == 1}))
    return found

for name in sys.argv[1:]:
    try:
        found = places(name)
    except Exception:
        found = None
    print(json.dumps([name, found]), flush=True)
"""


def plain_mats(paths: Sequence[Path]) -> dict[Path, Places | None]:
    """What scipy reads from each file; None where it fails or ends the process."""
    found: dict[Path, Places | None] = {}
    left = list(paths)
    while left:
        command = [sys.executable, "-c", _PLAIN_MAT, *map(str, left)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        for line in done.stdout.splitlines():
            name, people = json.loads(line)
            found[Path(name)] = people and [
                (image_name, {int(k): tuple(place) for k, place in placed.items()})
                for image_name, placed in people
            ]
        if len(found) + len(left) == len(paths):  # it read none of the rest
            found[left[0]] = None
        left = [path for path in paths if path not in found]
    return found


def hrnet_file(path: Path) -> Path:
    """Two people, one of them with a missing joint."""
    records = [hrnet_record("1.jpg"), hrnet_record("2.jpg", joints_vis=[0] + [1] * 15)]
    path.write_text(json.dumps(records))
    return path


def cpm_file(path: Path) -> Path:
    """Two people, one of LSP, as indented text."""
    records = [cpm_record("1.jpg"), cpm_record("1.jpg", dataset="LEEDS")]
    path.write_text(json.dumps(records, indent=1))
    return path


def mat_file(path: Path, *, compress: bool) -> Path:
    """Two images, three people, one of them with one joint."""
    one = person(annopoints=points({3: (5, 6)}))
    few = points({k: xy for k, xy in joints().items() if k < 4})
    images = [image("1.jpg", person(annopoints=few), one), image("2.jpg", one)]
    return write_mat(path, images, compress=compress)


def read_or_refusal(path: Path, reader: Callable[[Path], Any]) -> Any:
    """What the reader gives, or None if it refused the file in one clear line."""
    try:
        return reader(path)
    except UserError as error:
        line = str(error)
    assert "\n" not in line
    assert str(path) in line
    assert len(line.replace(str(path), "")) < 400
    return None


def assert_same_places(found: Places, expected: Places) -> None:
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (_, placed), (_, other) in zip(found, expected, strict=True):
        assert placed.keys() == other.keys()
        for joint, place in placed.items():
            np.testing.assert_allclose(place, other[joint], rtol=1e-12, atol=1e-9)


def flat(places: Places) -> set[tuple[int, int, tuple[float, float]]]:
    """Person, joint and place of everything labelled."""
    return {(n, k, place) for n, (_, placed) in enumerate(places) for k, place in placed.items()}


def fuzz_pts(folder: Path, generator: np.random.Generator, count: int) -> int:
    """The number of files refused of `count`; all others are read right."""
    original = pts_text(generator.uniform(5, 250, (68, 2)).round(3)).encode()
    path, refused = folder / "face.pts", 0
    for _ in range(count):
        path.write_bytes(mutated_bytes(original, generator))
        found = read_or_refusal(path, read_pts)
        refused += found is None
        if found is not None:
            np.testing.assert_allclose(found + 1, plain_pts(path.read_bytes()))
    return refused


def fuzz_json(
    folder: Path,
    generator: np.random.Generator,
    count: int,
    make: Callable[[Path], Path],
    *,
    as_tree: bool,
) -> int:
    """As `fuzz_pts`; mutates bytes, or values in the tree."""
    path = make(folder / "valid.json")
    original, refused = path.read_bytes(), 0
    mutated = mutated_json if as_tree else mutated_bytes
    for _ in range(count):
        path.write_bytes(mutated(original, generator))
        found = read_or_refusal(path, read_json)
        refused += found is None
        if found is not None:
            assert_same_places(places_of(found), plain_json(path.read_bytes()))
    return refused


def fuzz_mat(
    folder: Path, generator: np.random.Generator, count: int, *, compress: bool
) -> tuple[int, int]:
    """As `fuzz_pts`, and the number of accepted files that scipy could not read.

    In those, fields that are never read are damaged: the places are the original's, but for one
    changed by each of the other mutations.
    """
    original = mat_file(folder / "original.mat", compress=compress)
    data, whole = original.read_bytes(), places_of(read_release(original))
    accepted: dict[Path, Places] = {}
    for number in range(count):
        path = folder / f"{number}.mat"
        path.write_bytes(mutated_bytes(data, generator))
        found = read_or_refusal(path, read_release)
        if found is not None:
            accepted[path] = places_of(found)
    plain = plain_mats([original, *accepted])
    assert plain[original] is not None
    assert_same_places(whole, plain[original])
    for path, places in accepted.items():
        expected = plain[path]
        if expected is not None:
            assert_same_places(places, expected)
        else:
            assert len(flat(places) ^ flat(whole)) <= 2 * _MAX_CHANGES
    return count - len(accepted), sum(plain[path] is None for path in accepted)


def test_damaged_point_files_are_refused_or_read_right(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    assert fuzz_pts(tmp_path, generator, _MUTATIONS) > 0.3 * _MUTATIONS


@pytest.mark.parametrize("make", [hrnet_file, cpm_file])
@pytest.mark.parametrize("as_tree", [True, False])
def test_damaged_json_lists_are_refused_or_read_right(
    tmp_path: Path, generator: np.random.Generator, make: Callable[[Path], Path], as_tree: bool
) -> None:
    refused = fuzz_json(tmp_path, generator, _MUTATIONS // 2, make, as_tree=as_tree)
    assert refused > 0.1 * _MUTATIONS // 2


def test_damaged_compressed_mat_files_are_always_refused_by_their_checksum(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    refused, _ = fuzz_mat(tmp_path, generator, _MUTATIONS, compress=True)
    # A change in the first 116 bytes, a comment, harms nothing.
    assert refused > 0.9 * _MUTATIONS


def test_damaged_mat_files_are_refused_or_read_right(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    refused, _ = fuzz_mat(tmp_path, generator, _MUTATIONS, compress=False)
    assert refused > 0.3 * _MUTATIONS
