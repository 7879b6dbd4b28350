"""The command `predict`."""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from fedcunet.commands.options import (
    CheckpointOption,
    DeviceOption,
    FlipTestOption,
    JsonOption,
    progress_bar,
)
from fedcunet.data import Annotation
from fedcunet.data.affine import apply_affine
from fedcunet.data.annotations import LandmarkScheme
from fedcunet.data.crops import Crops
from fedcunet.data.drawing import draw_landmarks
from fedcunet.data.images import read_image, write_image
from fedcunet.errors import UserError
from fedcunet.files import write_atomically
from fedcunet.training.checkpoint import load_checkpoint, to_device
from fedcunet.training.evaluation import predict_batches

MAX_BOX = 1e5  # pixels
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


def predict(
    source: Annotated[Path, typer.Argument(help="An image, or a folder of images.")],
    checkpoint: CheckpointOption,
    out: Annotated[Path, typer.Option("--out", help="Folder for pictures and points.json.")],
    box: Annotated[
        str | None, typer.Option("--box", help="x,y,w,h in pixels; the whole image where absent.")
    ] = None,
    flip_test: FlipTestOption = False,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Writes each image with the predicted points drawn, and their coordinates as points.json.

    Coordinates are 0-based pixels of the picture that is written and that viewers show: an
    orientation tag, as phones set it, is applied. A given box, in the same pixels, is cropped as it
    is.
    """
    loaded = load_checkpoint(checkpoint)
    to_device(loaded.model, device)
    images = _images(source)
    annotations = [_unlabelled(path, loaded.scheme, box) for path in images]
    size = loaded.config.data.size
    crops = Crops(annotations, loaded.scheme, size=size, budget_bytes=0, oriented=True)
    folders = {path.parent.resolve() for path in images}
    if out.resolve() in folders | {path.resolve().parent for path in images}:
        raise UserError(f"--out {out}: expected another folder than that of the images")
    points: dict[str, Any] = {}
    with progress_bar(Console(stderr=True)) as progress:
        bar = progress.add_task("images", total=len(images))
        for indices, predicted_BK2, to_image_B23 in predict_batches(
            loaded.model, crops, flip_test=flip_test
        ):
            mapped_BK2 = apply_affine(to_image_B23, predicted_BK2)
            for index, found_K2 in zip(indices, mapped_BK2, strict=True):
                path = images[index]
                every_K = np.ones(len(found_K2), dtype=bool)
                picture = draw_landmarks(
                    read_image(path, oriented=True), found_K2, every_K, loaded.scheme
                )
                write_image(out / f"{path.stem}.png", picture)
                points[path.name] = np.round(found_K2, 2).tolist()
                progress.advance(bar)
    write_atomically(out / "points.json", json.dumps(points) + "\n")
    if as_json:
        print(json.dumps(points))
    else:
        print(f"{out}: {len(images)} pictures and points.json")


def _images(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{source}: expected an image or a folder of images, found nothing")
    images = sorted(path for path in source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise UserError(f"{source}: expected images ({', '.join(IMAGE_SUFFIXES)}), found none")
    stems = [path.stem for path in images]
    if len(set(stems)) != len(stems):
        raise UserError(f"{source}: two images have the same name without suffix")
    return images


def _unlabelled(path: Path, scheme: LandmarkScheme, box: str | None) -> Annotation:
    """An annotation without points whose box is the given one, or the whole image."""
    height, width = read_image(path, oriented=True).shape[:2]
    corners = (0.0, 0.0, float(width), float(height))
    if box is not None:
        try:
            x, y, box_width, box_height = map(float, box.split(","))
        except ValueError:
            raise UserError(f"--box: expected x,y,w,h, found '{box}'") from None
        sides = 1 <= box_width <= MAX_BOX and 1 <= box_height <= MAX_BOX
        if not (sides and x < width and y < height and x + box_width > 0 and y + box_height > 0):
            raise UserError(
                f"--box {box}: expected a box that meets {path}, {width}x{height} pixels, "
                f"with sides of 1 to {MAX_BOX:g} pixels"
            )
        corners = (x, y, box_width, box_height)
    return Annotation(
        image=path,
        points_K2=np.zeros((scheme.num_landmarks, 2)),
        labelled_K=np.zeros(scheme.num_landmarks, dtype=bool),
        # Pixel centres are whole numbers: the image begins at -0.5.
        box_xywh=(corners[0] - 0.5, corners[1] - 0.5, corners[2], corners[3]),
        box_origin="image",
        source="",
        photo=path.stem,
    )
