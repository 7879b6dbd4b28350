"""The embedded face set on disk: photographs painted by numbers, in the folders of 300-W.

`ROOT/afw`, `ROOT/helen/{trainset,testset}`, `ROOT/lfpw/{trainset,testset}`, `ROOT/ibug` with `.pts`
beside every picture, so that the 300-W reader loads it as it is. Each folder has its own character,
as the real ones have: AFW small, dim and crowded; HELEN large and bright; LFPW of mixed sharpness and
compression; IBUG strongly turned, expressive and partly hidden.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from ...errors import UserError
from .photos import Photo, Source, jpeg_again, make_photo
from .scene import noise_bank

VERSION = 1  # of the painting: other numbers, other bytes
MANIFEST = "faces.json"
_AFW = Source(
    folder="afw", suffix=".jpg", side=(150, 170), face=(0.38, 0.48), yaw=18, pitch=9, roll=8, expression=1.0,
    companions=0.45, clutter=0.9, hardness=0.6, gain=(0.6, 0.95), saturation=(0.6, 1.05), warmth=0.05,
    blur=(0.4, 1.0), motion=0.05, noise=(3, 9), jpeg=(55, 85), grey=0.03, occluders=0.1,
)  # fmt: skip
_HELEN = Source(
    folder="helen/trainset", suffix=".jpg", side=(190, 204), face=(0.46, 0.54), yaw=12.5, pitch=8, roll=7,
    expression=1.15, companions=0.1, clutter=0.4, hardness=0.4, gain=(0.92, 1.15), saturation=(0.9, 1.15),
    warmth=0.02, blur=(0.0, 0.6), motion=0.0, noise=(1, 4), jpeg=(80, 95), grey=0.05, occluders=0.08,
)  # fmt: skip
_LFPW = Source(
    folder="lfpw/trainset", suffix=".png", side=(165, 190), face=(0.46, 0.56), yaw=15, pitch=8, roll=6,
    expression=0.8, companions=0.0, clutter=0.25, hardness=0.75, gain=(0.8, 1.15), saturation=(0.5, 1.1),
    warmth=-0.03, blur=(0.0, 1.7), motion=0.12, noise=(1, 6), jpeg=(22, 80), grey=0.15, occluders=0.06,
)  # fmt: skip
_IBUG = Source(
    folder="ibug", suffix=".jpg", side=(175, 190), face=(0.45, 0.55), yaw=22, pitch=11, roll=11, expression=1.7,
    companions=0.0, clutter=0.7, hardness=0.8, gain=(0.65, 1.2), saturation=(0.7, 1.1), warmth=0.03,
    blur=(0.2, 1.2), motion=0.06, noise=(2, 7), jpeg=(50, 90), grey=0.08, occluders=0.45, glasses=0.22,
)  # fmt: skip
_TRAIN = ((_AFW, 0.24), (_HELEN, 0.46), (_LFPW, 0.30))
_TEST = (
    (dataclasses.replace(_HELEN, folder="helen/testset"), 0.46),
    (dataclasses.replace(_LFPW, folder="lfpw/testset"), 0.34),
    (_IBUG, 0.20),
)


def make_faces(
    root: Path,
    *,
    num_train: int = 720,
    num_test: int = 160,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write the face set to the folder `root`, or return at once where it already is.

    The set is made in a temporary folder beside `root` and renamed when it is complete. Faces depend
    on `seed` and their place in their folder alone, so the same arguments give the same bytes, and
    no photo of a test folder is one of a training folder.

    Args:
        root: Folder to make; absent, empty, or holding a set made with the same arguments.
        num_train: Faces in afw, helen/trainset and lfpw/trainset together, at least 3.
        num_test: Faces in helen/testset, lfpw/testset and ibug together, at least 3.
        seed: At least 0.
        progress: Called with (faces done, faces in all) after each photo.

    Returns:
        Number of faces for each folder.

    Raises:
        UserError: For counts or a seed that cannot be, and where `root` holds anything else.
    """
    for name, value, least in (
        ("num_train", num_train, 3),
        ("num_test", num_test, 3),
        ("seed", seed, 0),
    ):
        if value < least:
            raise UserError(f"make_faces: {name} must be at least {least}, found {value}")
    root = Path(root)
    plan = [*_shares(_TRAIN, num_train), *_shares(_TEST, num_test)]
    counts = {source.folder: count for source, count in plan}
    wanted = {
        "version": VERSION,
        "seed": seed,
        "num_train": num_train,
        "num_test": num_test,
        "counts": counts,
    }
    if _is_made(root, wanted):
        return counts
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        _write_all(work, plan, seed, progress)
        (work / MANIFEST).write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
        work.chmod(0o777 & ~_umask())  # mkdtemp made it private
        os.replace(work, root)  # an empty folder there is replaced
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return counts


def _is_made(root: Path, wanted: dict[str, object]) -> bool:
    """Whether `root` already holds the wanted set; refuses what is there otherwise."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise UserError(f"{root}: expected a folder for the embedded faces, found a file")
    if not any(root.iterdir()):
        return False
    try:
        found = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        described = {key: found[key] for key in ("version", "seed", "num_train", "num_test")}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{root}: expected an absent or empty folder or a face set, found other files; nothing was changed"
        ) from None
    asked = {key: wanted[key] for key in described}
    if described != asked:
        raise UserError(
            f"{root}: expected a face set with {_words(asked)}, found one with {_words(described)}"
        )
    return True


def _words(values: dict[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _shares(parts: tuple[tuple[Source, float], ...], total: int) -> list[tuple[Source, int]]:
    """Whole counts, at least 1 each, that add up to `total`; the largest part takes what rounding leaves."""
    counts = [max(1, int(total * share)) for _, share in parts]
    counts[int(np.argmax([share for _, share in parts]))] += total - sum(counts)
    return [(source, count) for (source, _), count in zip(parts, counts, strict=True)]


def _write_all(
    work: Path,
    plan: list[tuple[Source, int]],
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    bank = noise_bank(seed)
    total, done = sum(count for _, count in plan), 0
    for place, (source, count) in enumerate(plan):
        folder = work / source.folder
        folder.mkdir(parents=True)
        number = 0
        for index, photo in enumerate(_photos(source, place, count, seed, bank)):
            for face in range(len(photo.faces)):
                number += 1
                name = _name(source, place, index, face, number)
                _write_face(folder / name, source, photo, face)
            done += len(photo.faces)
            if progress is not None:
                progress(done, total)


def _photos(source: Source, place: int, count: int, seed: int, bank: np.ndarray) -> Iterator[Photo]:
    """The photos of one folder, `count` faces in all; each has a generator of its own."""
    index = 0
    while count > 0:
        generator = np.random.default_rng(np.random.SeedSequence([seed, place, index]))
        num_faces = 1
        while num_faces < 3 and generator.random() < source.companions:
            num_faces += 1
        num_faces = min(num_faces, count)
        yield make_photo(source, num_faces, bank, generator)
        count -= num_faces
        index += 1


def _name(source: Source, place: int, index: int, face: int, number: int) -> str:
    """File name without suffix, in the manner of the folder: `<photo>_<face>` or `image_0001`."""
    if source.companions:
        return f"{(place + 1) * 100_000_000 + 7919 * index}_{face + 1}"
    return f"image_{number:04d}"


def _write_face(path: Path, source: Source, photo: Photo, face: int) -> None:
    picture = photo.faces[face].picture
    options = [cv2.IMWRITE_JPEG_QUALITY, photo.jpeg]
    if source.suffix == ".png":
        picture, options = jpeg_again(picture, photo.jpeg), [cv2.IMWRITE_PNG_COMPRESSION, 1]
    ok, coded = cv2.imencode(source.suffix, picture, options)
    assert ok
    path.with_suffix(source.suffix).write_bytes(coded.tobytes())
    rows = "\n".join(f"{x:.6f} {y:.6f}" for x, y in photo.faces[face].points + 1.0)  # 1-based
    path.with_suffix(".pts").write_text(
        f"version: 1\nn_points:  68\n{{\n{rows}\n}}\n", encoding="ascii"
    )
