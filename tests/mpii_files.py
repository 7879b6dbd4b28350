"""Small MPII files for tests, in the nesting of the real ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import savemat

from fedcunet.data.mpii_writer import struct_array

EMPTY = np.zeros((0, 0))


def points(
    xy_by_id: dict[int, tuple[float, float]], visible: Any = "1", order: int = 1
) -> dict[str, Any]:
    """annopoints of 1-based places by joint id; `order` -1 stores them backwards."""
    records = [
        {"x": float(x), "y": float(y), "id": float(joint)}
        | ({} if visible is None else {"is_visible": visible})
        for joint, (x, y) in xy_by_id.items()
    ]
    return {"point": struct_array(records[::order])}


def joints(x: float = 100.0, y: float = 50.0) -> dict[int, tuple[float, float]]:
    """1-based places of all 16 joints, all different."""
    return {joint: (x + 3 * joint, y + 7 * joint) for joint in range(16)}


def person(**changes: Any) -> dict[str, Any]:
    """A whole annorect; a value None takes the field away."""
    record: dict[str, Any] = {
        "x1": 90.0,
        "y1": 20.0,
        "x2": 120.0,
        "y2": 60.0,
        "annopoints": points(joints()),
        "scale": 2.0,
        "objpos": {"x": 130.0, "y": 110.0},
    } | changes
    return {name: value for name, value in record.items() if value is not None}


def image(name: str, *people: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """An annolist record with its act and single_person under keys of their own."""
    rectangles = struct_array(people) if people else EMPTY
    return {"image": {"name": name}, "annorect": rectangles, "frame_sec": 1.0} | fields


def write_mat(
    path: Path,
    images: Sequence[dict[str, Any]],
    *,
    train: Sequence[int] | None = None,
    single: Sequence[Sequence[int]] | None = None,
    acts: Sequence[dict[str, Any]] | None = None,
    compress: bool = True,
) -> Path:
    """RELEASE with these images."""
    cells = np.empty(len(images), dtype=object)
    for index in range(len(images)):
        cells[index] = np.array([[1]] if single is None else list(single[index]), dtype=np.float64)
    release = {
        "annolist": struct_array(images),
        "img_train": np.array([1] * len(images) if train is None else train, dtype=np.uint8),
        "single_person": cells,
        "act": struct_array(
            acts or [{"cat_name": EMPTY, "act_name": EMPTY, "act_id": -1.0}] * len(images)
        ),
        "version": "12",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"RELEASE": release}, do_compression=compress)
    return path


def hrnet_record(name: str, **changes: Any) -> dict[str, Any]:
    """A person of HRNet's lists, equal to `person()`."""
    return {
        "image": name,
        "center": [130.0, 110.0],
        "scale": 2.0,
        "joints": [list(xy) for xy in joints().values()],
        "joints_vis": [1] * 16,
    } | changes


def cpm_record(name: str, *, validation: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A person of CPM's list, equal to `person()`."""
    return {
        "dataset": "MPI",
        "isValidation": validation,
        "img_paths": name,
        "objpos": [130.0, 110.0],
        "scale_provided": 2.0,
        "joint_self": [[*xy, 1.0] for xy in joints().values()],
        "annolist_index": 1.0,
        "people_index": 1.0,
    } | changes


def write_images(root: Path, names: Sequence[str]) -> Path:
    """Files in root/images that readers only look for."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / "images" / name).write_bytes(b"not decoded by the reader")
    return root


def write_json(root: Path, name: str, records: Any) -> Path:
    """`records` as the file `annot/NAME` of `root`."""
    path = root / "annot" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return path
