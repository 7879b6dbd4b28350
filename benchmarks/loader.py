"""Images per second of the loader beside decoding and warping each image anew, in one run.

    python benchmarks/loader.py [--data 300w --root DIR] [--size 64 ...] [--images N] [--out FILE]

The plain loader beside it is what one would write first: OpenCV reads the image, one affine warp,
colour factors in numpy; same crops, same augmentation. Without --data, faces are drawn for it, in
pictures of 720 by 720 pixels. One thread, batches of 16; seconds are those that the process had the
core for, so that other work on the machine does not count. All files are in the system's memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Before numpy starts its threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import torch

from fedcunet.data import AnnotationSet, load
from fedcunet.data.affine import apply_affine, invert_affine
from fedcunet.data.augmentation import Augmentation
from fedcunet.data.crops import Crops, crop_square
from fedcunet.data.disk_cache import DiskCache

BATCH = 16
EPOCHS = 3  # of each of plain and memory; the best counts
SIDE = 720  # of the pictures that are made
Batch = Callable[[list[int], np.random.Generator], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a data set instead of drawn faces")
    parser.add_argument("--root", help="its folder")
    parser.add_argument("--size", type=int, nargs="+", default=[64, 256], help="sides of crops")
    parser.add_argument("--images", type=int, default=512, help="at most this many")
    parser.add_argument("--seed", type=int, default=0, help="of pictures and augmentation")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)  # the fresh process's
    arguments = parser.parse_args()
    if (arguments.data is None) != (arguments.root is None):
        parser.error("--data and --root belong together")
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data, root = arguments.data, arguments.root
        if data is None:
            data, root = "faces", str(drawn_faces(Path(folder), arguments.images, arguments.seed))
        found = load(data, root, "train")
        if arguments.cache:
            crops = our_crops(found, arguments.size[0], arguments.images, arguments.cache)
            print(epoch_rate(ours(crops, found), len(crops), arguments.seed))
            return
        rows = [
            measure(found, data, root, size, arguments.images, arguments.seed, Path(folder))
            for size in arguments.size
        ]
    text = json.dumps({"data": arguments.data or f"faces drawn at {SIDE}", "rows": rows}, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def drawn_faces(folder: Path, count: int, seed: int) -> Path:
    """Procedural faces, enlarged to the size of photographs."""
    from fedcunet.data.procedural import make_faces

    root = folder / "faces"
    make_faces(root, num_train=count, num_test=4, seed=seed)
    for path in root.rglob("*.jpg"):
        image_HW3 = cv2.imread(str(path))
        factor = SIDE / max(image_HW3.shape[:2])
        cv2.imwrite(str(path), cv2.resize(image_HW3, None, fx=factor, fy=factor))
        points = path.with_suffix(".pts")
        lines = points.read_text().splitlines()
        numbers = np.array([line.split() for line in lines[3:71]], dtype=float) - 1
        scaled = (numbers + 0.5) * factor - 0.5 + 1
        lines[3:71] = [f"{x:.6f} {y:.6f}" for x, y in scaled]
        points.write_text("\n".join(lines) + "\n")
    return root


def our_crops(found: AnnotationSet, size: int, count: int, cache: Path | None) -> Crops:
    disk = DiskCache(cache, 2**34) if cache else None
    annotations = found.annotations[:count]
    return Crops(annotations, found.scheme, size=size, budget_bytes=2**33, disk=disk)


def ours(crops: Crops, found: AnnotationSet) -> Batch:
    augmentation = Augmentation(flip=not found.scheme.is_face)
    return lambda indices, generator: crops.batch(
        indices, augmentation=augmentation, generator=generator
    )


def plain(found: AnnotationSet, size: int) -> Batch:
    """Each image decoded and warped anew, as straight as it can be written."""
    order = list(found.scheme.flip_order)

    def one(index: int, generator: np.random.Generator) -> tuple[torch.Tensor, np.ndarray]:
        annotation = found.annotations[index]
        image_HW3 = cv2.imread(
            str(annotation.image), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        )
        centre_2, side = crop_square(annotation, found.scheme)
        pixel = side * generator.uniform(0.75, 1.25) / size
        angle = np.radians(generator.uniform(-30, 30))
        flip = not found.scheme.is_face and generator.random() < 0.5
        turn_22 = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix_23 = np.zeros((2, 3))
        matrix_23[:, :2] = pixel * turn_22 * (-1 if flip else 1, 1)
        matrix_23[:, 2] = centre_2 - matrix_23[:, :2] @ np.full(2, (size - 1) / 2)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        crop_HW3 = cv2.warpAffine(image_HW3, matrix_23, (size, size), flags=flags)
        gain_3 = generator.uniform(0.6, 1.4, 3).astype(np.float32)
        coloured_HW3 = np.clip(crop_HW3.astype(np.float32) / 255 * gain_3, 0, 1)
        points_K2 = apply_affine(invert_affine(matrix_23[None]), annotation.points_K2[None])[0]
        picture_3HW = torch.from_numpy(coloured_HW3).permute(2, 0, 1).contiguous()
        return picture_3HW, points_K2[order] if flip else points_K2

    def batch(indices: list[int], generator: np.random.Generator) -> object:
        images, points = zip(*(one(index, generator) for index in indices), strict=True)
        return torch.stack(images), np.stack(points)

    return batch


def epoch_rate(batch: Batch, count: int, seed: int) -> float:
    """Images per second of the core's time, of one pass in random order."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(count).tolist()
    begin = time.process_time()
    for start in range(0, count, BATCH):
        batch(order[start : start + BATCH], generator)
    return count / (time.process_time() - begin)


def measure(
    found: AnnotationSet, data: str, root: str, size: int, count: int, seed: int, folder: Path
) -> dict[str, float]:
    """One row: rates of the ways to load, and their ratios to the plain one."""
    cache = folder / f"cache{size}"
    crops = our_crops(found, size, count, cache)
    for annotation in found.annotations[:count]:
        annotation.image.read_bytes()  # the files are in memory for all of them
    slow = plain(found, size)
    rates = {
        "plain": max(epoch_rate(slow, len(crops), seed) for _ in range(EPOCHS)),
        "first_epoch": epoch_rate(ours(crops, found), len(crops), seed),
        "later_epochs": max(
            epoch_rate(ours(crops, found), len(crops), seed) for _ in range(EPOCHS)
        ),
    }
    command = [sys.executable, __file__, "--data", data, "--root", root, "--size", str(size)]
    command += ["--images", str(count), "--seed", str(seed), "--cache", str(cache)]
    fresh = subprocess.run(command, check=True, capture_output=True, text=True)
    rates["fresh_process"] = float(fresh.stdout)
    row: dict[str, float] = {"size": size, "images": len(crops)}
    row["memory_bytes"] = crops.cached_bytes
    row["disk_bytes"] = sum(path.stat().st_size for path in cache.rglob("*.crop"))
    for name, rate in rates.items():
        row[f"{name}_images_per_second"] = round(rate, 1)
        if name != "plain":
            row[f"{name}_ratio"] = round(rate / rates["plain"], 2)
    shown = "  ".join(
        f"{name.replace('_', ' ')} {rate:.0f}/s ({rate / rates['plain']:.1f}×)"
        for name, rate in rates.items()
    )
    print(f"{data} {size}×{size}, {len(crops)} images:  {shown}", file=sys.stderr)
    return row


if __name__ == "__main__":
    main()
