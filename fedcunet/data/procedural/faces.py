"""The embedded face set on disk: photographs painted by numbers, in the folders of 300-W.

`ROOT/afw`, `ROOT/helen/{trainset,testset}`, `ROOT/lfpw/{trainset,testset}`, `ROOT/ibug` with `.pts`
beside every picture, so that the 300-W reader loads it as it is.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from ...errors import UserError
from .folders import make_once
from .photos import Photo, jpeg_again, make_photo
from .scene import noise_bank
from .sources import TEST, TRAIN, Source

VERSION = 1  # of the painting: other numbers, other bytes
MANIFEST = "faces.json"


def make_faces(
    root: Path,
    *,
    num_train: int = 720,
    num_test: int = 160,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write the face set to the folder `root`, or return at once where it already is.

    The set is made in a temporary folder beside `root` and renamed when it is complete. Faces
    depend on `seed` and their place in their folder alone, so the same arguments give the same
    bytes, and no photo of a test folder is one of a training folder.

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
    plan = [*_shares(TRAIN, num_train), *_shares(TEST, num_test)]
    counts = {source.folder: count for source, count in plan}
    wanted = {
        "version": VERSION,
        "seed": seed,
        "num_train": num_train,
        "num_test": num_test,
        "counts": counts,
    }
    make_once(
        root,
        kind="face set",
        manifest=MANIFEST,
        wanted=wanted,
        write=lambda work: _write_all(work, plan, seed, progress),
    )
    return counts


def _shares(parts: tuple[tuple[Source, float], ...], total: int) -> list[tuple[Source, int]]:
    """Whole counts, at least 1 each; the largest part takes what rounding leaves."""
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
