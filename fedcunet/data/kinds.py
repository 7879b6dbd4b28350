"""Which data set a folder holds, told by its files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedcunet.data.matlab import read_mat
from fedcunet.data.mpii import has_annotations
from fedcunet.data.w300 import OFFICIAL_COUNTS
from fedcunet.errors import UserError

# A procedural set's manifest, beside the files of the set whose form it has.
_MANIFESTS = {"faces.json": "faces", "people.json": "people"}


def detect_kind(root: Path) -> str:
    """The key of `DATASETS` for the folder `root`.

    Raises:
        UserError: the folder is no data set, or more than one.
    """
    if not root.is_dir():
        raise UserError(f"{root}: expected the folder of a data set, found none")
    made = [kind for manifest, kind in _MANIFESTS.items() if (root / manifest).is_file()]
    found = made or [kind for kind, is_it in _TESTS.items() if is_it(root)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{root}: holds files of {' and '.join(found)}; say which with --data")
    below = [child.name for child in sorted(root.iterdir()) if child.is_dir() and _any(child)]
    hint = f"; below it are {', '.join(below[:6])}" if below else ""
    raise UserError(
        f"{root}: expected the folders of 300-W, the annotation files of MPII, or joints.mat, "
        f"found none{hint}"
    )


def _any(root: Path) -> bool:
    return any(is_it(root) for is_it in _TESTS.values())


def _is_300w(root: Path) -> bool:
    return any((root / folder).is_dir() for folder in OFFICIAL_COUNTS)


def _joints_shape(root: Path) -> tuple[int, ...]:
    path = root / "joints.mat"
    if not path.is_file():
        return ()
    joints = read_mat(path, "joints")
    return joints.shape[:2] if isinstance(joints, np.ndarray) else ()


_TESTS: dict[str, Callable[[Path], bool]] = {
    "300w": _is_300w,
    "mpii": has_annotations,
    "lsp": lambda root: _joints_shape(root) == (3, 14),
    "lspet": lambda root: _joints_shape(root) == (14, 3),
}
