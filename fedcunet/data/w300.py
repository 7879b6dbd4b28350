"""Reader of the 300-W faces (Sagonas et al., 2013): images with 68 points, in the official folders.

    afw | helen/trainset | helen/testset | lfpw/trainset | lfpw/testset | ibug
    300W/01_Indoor, 300W/02_Outdoor (private test; also below Test/)
    Bounding_Boxes/bounding_boxes_*.mat

The files are 1-based (MATLAB); everything that leaves this module is 0-based.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedcunet.data.annotations import (
    FACE68,
    Annotation,
    AnnotationSet,
    BoxOrigin,
    square_landmark_box,
)
from fedcunet.data.matlab import one_struct, read_mat, short, text
from fedcunet.errors import UserError

_TRAIN = ("afw", "helen/trainset", "lfpw/trainset")
_COMMON = ("helen/testset", "lfpw/testset")
_CHALLENGE = ("ibug",)
_PRIVATE = ("300W/01_Indoor", "300W/02_Outdoor", "Test/01_Indoor", "Test/02_Outdoor")
SUBSETS = {
    "train": _TRAIN,
    "common": _COMMON,
    "challenge": _CHALLENGE,
    "test": _COMMON + _CHALLENGE,
    "full": _COMMON + _CHALLENGE,
    "private": _PRIVATE,
}
# Faces in the official distribution, for `fedcunet data check`.
OFFICIAL_COUNTS = {
    "afw": 337,
    "helen/trainset": 2000,
    "lfpw/trainset": 811,
    "helen/testset": 330,
    "lfpw/testset": 224,
    "ibug": 135,
    "300W/01_Indoor": 300,
    "300W/02_Outdoor": 300,
    "Test/01_Indoor": 300,
    "Test/02_Outdoor": 300,
}
BOXES = ("landmarks", "given", "ground-truth")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
_LISTED_NAMES = 5
# Python's float() also takes "1_0", "nan" and digits of other scripts.
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")
# Farther out than any image reaches: such a number is damage.
_MAX_COORDINATE = 1e5


def load_300w(
    root: Path, subset: str, *, boxes: str = "landmarks", name: str = "300w"
) -> AnnotationSet:
    """Faces of one subset of the 300-W folders below `root`.

    Args:
        root: the folder that holds afw, helen, ...
        subset: "train", "common", "challenge", "test" or "full" (common and challenge), "private",
            or one folder such as "helen/testset". Of a subset's folders those that exist are read.
        boxes: "landmarks" (the square landmark box), "given" (the detector's box of
            Bounding_Boxes/*.mat) or "ground-truth" (the tight box in the same file). A face
            without a given box keeps its landmark box, and `problems` says how many.
        name: the data set's name in the result.

    Training faces whose photo also stands in a test folder are left out: HELEN has such a photo.

    Raises:
        UserError: a folder is missing or empty, or a `.pts` file is not 68 finite points.
    """
    root = Path(root)
    if boxes not in BOXES:
        raise UserError(f"{name}: boxes must be one of {', '.join(BOXES)}, found {boxes!r}")
    problems: list[str] = []
    if repackaged := sorted(root.glob("labels_ibug_300W*.xml")):
        problems.append(
            f"{repackaged[0].name}: of dlib's repackaged set, whose train and test mix those of "
            "300-W; not read, the folders decide"
        )
    folders = _existing_folders(root, subset, name, problems)
    test_photos = _photos_of_test_folders(root)
    annotations: list[Annotation] = []
    for folder in folders:
        pairs = _paired_files(root, folder, problems)
        given = {} if boxes == "landmarks" else _given_boxes(root, folder, boxes)
        without_box = 0
        unscored: list[str] = []
        damaged: list[str] = []
        for image, pts in pairs:
            photo = photo_key(folder, image.stem)
            if folder in _TRAIN and photo in test_photos:
                problems.append(
                    f"{folder}/{image.name}: photo {photo} is in the test set too "
                    f"({test_photos[photo]}); left out of training"
                )
                continue
            try:
                points_K2 = read_pts(pts)
            except UserError as error:
                damaged.append(str(error))
                continue
            if (points_K2[36] == points_K2[45]).all():
                unscored.append(image.name)
            box = given.get(_squeezed(image.stem))
            without_box += boxes != "landmarks" and box is None
            annotations.append(_annotation(image, points_K2, box, folder, photo))
        if damaged:  # all are named at once, to be mended at once
            raise UserError("; ".join(damaged[:_LISTED_NAMES]) + _and_more(len(damaged)))
        if without_box:
            problems.append(
                f"{folder}: {without_box} of {len(pairs)} faces have no given box; "
                "their landmark box is used"
            )
        if unscored:
            names = ", ".join(unscored[:3]) + ", …" * (len(unscored) > 3)
            problems.append(
                f"{folder}: the outer eye corners of {len(unscored)} of {len(pairs)} faces "
                f"coincide ({names}); NME leaves them out"
            )
    if not annotations:
        raise UserError(
            f"{name} subset {subset!r}: expected images and .pts files in "
            f"{', '.join(str(root / f) for f in folders)}, "
            f"found {'; '.join(problems[:2]) or 'none'}"
        )
    return AnnotationSet(
        name=name,
        subset=subset,
        scheme=FACE68,
        annotations=tuple(annotations),
        problems=tuple(problems),
    )


def read_pts(path: Path, num_points: int = 68) -> np.ndarray:
    """0-based float64 (K, 2) points of a `.pts` file, with or without its header.

    Every line but the header's is a point of two numbers. Files in circulation lack the header or
    the final newline, or write integers and minus signs where a stricter pattern expects none.

    Raises:
        UserError: the file cannot be read, has another number of points, or a line that is no
            point.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    points: list[tuple[float, float]] = []
    for line in text.split("\n"):
        line = line.strip()
        if line in ("", "{", "}") or re.fullmatch(r"(version|n_points)\s*:\s*[0-9.]+", line):
            continue
        words = line.split()
        # A stray line is refused, not skipped: after a number broken in two the count may be right.
        if len(words) != 2 or not all(map(_NUMBER.fullmatch, words)):
            raise UserError(f"{path}: expected two numbers in a line, found {line[:60]!r}")
        point = (float(words[0]), float(words[1]))
        if max(abs(point[0]), abs(point[1])) > _MAX_COORDINATE:
            raise UserError(
                f"{path}: expected coordinates within {_MAX_COORDINATE:g} pixels, found {line!r}"
            )
        points.append(point)
    if len(points) != num_points:
        raise UserError(f"{path}: expected {num_points} points, found {len(points)}")
    return np.array(points, dtype=np.float64) - 1.0


def photo_key(folder: str, stem: str) -> str:
    """Name of the photo that the face `stem` in `folder` was cut from.

    AFW and HELEN name faces `<photo>_<k>`, and HELEN's two folders draw on one pool of photos. In
    LFPW and the private test a file is a photo; in IBUG the photo is `image_<number>`, whether or
    not a face number follows.
    """
    top = folder.split("/", 1)[0]
    stem = _squeezed(stem)
    if top in ("afw", "helen"):
        return f"{top}/{re.sub(r'_[0-9]+$', '', stem)}"
    if top == "ibug" and (match := re.match(r"image_[0-9]+", stem)):
        return f"{top}/{match.group()}"
    return f"{folder}/{stem}"


def _and_more(count: int) -> str:
    return f"; and {count - _LISTED_NAMES} more" if count > _LISTED_NAMES else ""


def _annotation(
    image: Path,
    points_K2: np.ndarray,
    box: tuple[float, float, float, float] | None,
    folder: str,
    photo: str,
) -> Annotation:
    labelled_K = np.ones(len(points_K2), dtype=bool)
    origin: BoxOrigin = "given" if box else "landmarks"
    return Annotation(
        image=image,
        points_K2=points_K2,
        labelled_K=labelled_K,
        box_xywh=box or square_landmark_box(points_K2, labelled_K),
        box_origin=origin,
        source=folder,
        photo=photo,
    )


def _squeezed(stem: str) -> str:
    # Box files, images and points do not agree on spaces ("image_092 _01").
    return stem.replace(" ", "")


def _existing_folders(root: Path, subset: str, name: str, problems: list[str]) -> list[str]:
    if not root.is_dir():
        raise UserError(
            f"{name}: {root} is not a folder: expected the folder that holds afw, helen, …"
        )
    wanted = SUBSETS.get(subset, (subset.strip("/"),))
    existing = [folder for folder in wanted if (root / folder).is_dir()]
    if wanted is _PRIVATE:  # one face must not count twice
        spelling = existing[0].split("/")[0] if existing else ""
        doubled = [folder for folder in existing if not folder.startswith(f"{spelling}/")]
        existing = [folder for folder in existing if folder not in doubled]
        problems.extend(
            f"{folder}: the private test under its other name; left out" for folder in doubled
        )
    if not existing:
        found = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:8]) or "no folder"
        known = "" if subset in SUBSETS else f" (subsets: {', '.join(SUBSETS)}, or one folder)"
        raise UserError(
            f"{name} subset {subset!r}: expected {' or '.join(wanted)} in {root}, "
            f"found {found}{known}"
        )
    if wanted is not _PRIVATE:  # its folders are two spellings of the same two
        problems.extend(f"{folder}: not there" for folder in wanted if folder not in existing)
    return existing


def _photos_of_test_folders(root: Path) -> dict[str, str]:
    photos: dict[str, str] = {}
    for folder in _COMMON + _CHALLENGE:
        if (root / folder).is_dir():
            for pts in sorted((root / folder).iterdir()):
                if pts.suffix.lower() != ".pts":
                    continue
                photos.setdefault(photo_key(folder, pts.stem), f"{folder}/{pts.name}")
    return photos


def _paired_files(root: Path, folder: str, problems: list[str]) -> list[tuple[Path, Path]]:
    """(image, points) files of a folder by name; one without a partner goes into `problems`."""
    images: dict[str, Path] = {}
    points: dict[str, Path] = {}
    mirrored = 0
    for path in sorted((root / folder).iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith(".") or suffix not in (*_IMAGE_SUFFIXES, ".pts"):
            continue
        if path.stem.endswith("_mirror"):
            mirrored += 1
        elif suffix == ".pts":
            points[_squeezed(path.stem)] = path
        else:
            images.setdefault(_squeezed(path.stem), path)
    if mirrored:
        problems.append(f"{folder}: {mirrored} _mirror files (not part of 300-W) are ignored")
    _report(problems, folder, "no image to", [points[s].name for s in points if s not in images])
    _report(problems, folder, "no .pts to", [images[s].name for s in images if s not in points])
    pairs = [(image, points[stem]) for stem, image in images.items() if stem in points]
    return sorted(pairs, key=lambda pair: pair[0].stem)


def _report(problems: list[str], folder: str, what: str, names: Sequence[str]) -> None:
    if len(names) <= _LISTED_NAMES:
        problems.extend(f"{folder}: {what} {name}; left out" for name in names)
    else:
        problems.append(
            f"{folder}: {what} {len(names)} files ({', '.join(names[:3])}, …); left out"
        )


def _given_boxes(
    root: Path, folder: str, boxes: str
) -> dict[str, tuple[float, float, float, float]]:
    """0-based (x, y, w, h) by image name without spaces and extension."""
    path = root / "Bounding_Boxes" / f"bounding_boxes_{folder.replace('/', '_')}.mat"
    if not path.is_file():
        raise UserError(f"{path}: not there: expected the box file of {folder} for boxes={boxes!r}")
    field = "bb_detector" if boxes == "given" else "bb_ground_truth"
    cells = read_mat(path, "bounding_boxes")
    if not isinstance(cells, list):
        raise UserError(f"{path}: expected cells in bounding_boxes, found {short(cells)}")
    result = {}
    for place, cell in enumerate(cells, start=1):
        where = f"{path}: face {place}"
        record = one_struct(cell, where)
        image_name = text(record, "imgName", where)
        corners = None if record is None else record.get(field)
        if not image_name or not isinstance(corners, np.ndarray) or corners.size != 4:
            raise UserError(f"{where}: expected imgName and 4 numbers in {field}")
        x0, y0, x1, y1 = (float(corner) for corner in corners.ravel())
        if not x1 > x0 or not y1 > y0 or not np.isfinite(corners).all():
            raise UserError(f"{where}: expected x0 < x1 and y0 < y1, found {short(corners)}")
        result[_squeezed(Path(image_name).stem)] = (x0 - 1.0, y0 - 1.0, x1 - x0, y1 - y0)
    return result
