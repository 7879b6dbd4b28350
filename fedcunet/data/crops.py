"""Square crops around faces and people, augmented, in batches.

Letters: B crops, H = W = S the crop's side, K landmarks, 2 = (x, y), N annotations.

An image is decoded once: the neighbourhood of its box, at most twice as fine as the crop, stays in
memory, and on disk for the other processes of the machine (`DiskCache`). Each sample of each batch
is then one affine warp of it, and the landmarks take the same affine map, so that crops and points
never drift apart. The ranges of scale, rotation and colour are those of the paper's released code
(see `Augmentation`).
"""

import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from fedcunet.data.affine import apply_affine, invert_affine
from fedcunet.data.annotations import Annotation, LandmarkScheme
from fedcunet.data.augmentation import Augmentation, coloured, draw
from fedcunet.data.base_crop import CUT_FORM, BaseCrop, cut
from fedcunet.data.disk_cache import DiskCache
from fedcunet.data.images import read_image
from fedcunet.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class CropBatch:
    """B crops with their landmarks.

    Attributes:
        images_B3HW: float32 RGB in [0, 1], in the channels-last layout that the networks convolve
            fastest; black outside the image.
        points_BK2: float32, 0-based crop pixels; may lie outside the crop.
        labelled_BK: bool.
        to_image_B23: float64; image pixel = A @ (crop x, crop y, 1). For a mirrored crop the map
            mirrors back, and the names of the landmarks stay exchanged.
    """

    images_B3HW: torch.Tensor
    points_BK2: torch.Tensor
    labelled_BK: torch.Tensor
    to_image_B23: np.ndarray


class Crops:
    """Crops of S by S pixels of a sequence of annotations, by index.

    Attributes:
        size: S.
        num_decoded: how many images were decoded so far; it keeps growing only when the
            neighbourhoods do not fit into the budget.
        cached_bytes: memory taken by the neighbourhoods that are kept.
        flip_order: landmark k of a mirrored crop is landmark flip_order[k] of the crop.
    """

    def __init__(
        self,
        annotations: Sequence[Annotation],
        scheme: LandmarkScheme,
        *,
        size: int,
        budget_bytes: int = 512 * 2**20,
        disk: DiskCache | None = None,
        oriented: bool = False,
    ) -> None:
        """Prepares the crops; images are decoded when first used.

        Args:
            annotations: what to crop.
            scheme: meaning of the landmarks; gives the crop factor and the mirror pairs.
            size: side of a crop in pixels.
            budget_bytes: once this much is kept in memory, further images are read from `disk`, or
                decoded, on every use.
            disk: where the neighbourhoods are kept for other processes too.
            oriented: see `read_image`; the boxes then refer to the picture as viewers show it.

        Raises:
            UserError: an annotation's box has no area, or its number of landmarks is not K.
        """
        if size < 1:
            raise UserError(f"crop size: expected 1 pixel or more, found {size}")
        self.size = size
        self.num_decoded = 0
        self.cached_bytes = 0
        self._annotations = tuple(annotations)
        self._budget_bytes = budget_bytes
        self._cache: dict[int, BaseCrop] = {}
        self._disk = disk
        self._oriented = oriented
        self._lock = threading.Lock()
        self.flip_order = np.array(scheme.flip_order)
        count, landmarks = len(self._annotations), scheme.num_landmarks
        self._points_NK2 = np.zeros((count, landmarks, 2))
        self._labelled_NK = np.zeros((count, landmarks), dtype=bool)
        self._centre_N2 = np.zeros((count, 2))
        self._side_N = np.zeros(count)
        self._head_N = np.array([annotation.head_size for annotation in self._annotations])
        for index, annotation in enumerate(self._annotations):
            if annotation.points_K2.shape != (landmarks, 2):
                raise UserError(
                    f"{annotation.image}: expected {landmarks} landmarks for {scheme.name}, "
                    f"found points of shape {annotation.points_K2.shape}"
                )
            self._points_NK2[index] = annotation.points_K2
            self._labelled_NK[index] = annotation.labelled_K
            self._centre_N2[index], self._side_N[index] = crop_square(annotation, scheme)

    def __len__(self) -> int:
        return len(self._annotations)

    def batch(
        self,
        indices: Sequence[int],
        *,
        augmentation: Augmentation | None = None,
        generator: np.random.Generator | None = None,
    ) -> CropBatch:
        """The crops of the annotations `indices`, in their order.

        Args:
            indices: B indices; the same index may occur twice.
            augmentation: random changes; None takes the plain crop.
            generator: the source of all randomness, needed with `augmentation`. A batch consumes
                the same number of draws per crop whatever the ranges are.

        Raises:
            UserError: an image cannot be decoded.
            ValueError: `augmentation` without `generator`.
        """
        index_B = np.asarray(indices, dtype=np.int64)
        count = len(index_B)
        scale_B, radians_B, flip_B, colour_B3 = draw(count, augmentation, generator)
        to_image_B23 = self._to_image(index_B, scale_B, radians_B, flip_B)
        images_BHW3 = np.empty((count, self.size, self.size, 3), dtype=np.uint8)
        for row, index in enumerate(index_B):
            self._warp(int(index), to_image_B23[row], images_BHW3[row])
        coloured_BHW3 = coloured(images_BHW3, colour_B3)
        points_BK2 = apply_affine(invert_affine(to_image_B23), self._points_NK2[index_B])
        labelled_BK = self._labelled_NK[index_B]
        if flip_B.any():
            points_BK2[flip_B] = points_BK2[flip_B][:, self.flip_order]
            labelled_BK[flip_B] = labelled_BK[flip_B][:, self.flip_order]
        return CropBatch(
            images_B3HW=torch.from_numpy(coloured_BHW3).permute(0, 3, 1, 2),
            points_BK2=torch.from_numpy(points_BK2.astype(np.float32)),
            labelled_BK=torch.from_numpy(labelled_BK),
            to_image_B23=to_image_B23,
        )

    def targets(self) -> tuple[np.ndarray, np.ndarray]:
        """Points (N, K, 2) in the pixels of the plain crops, float64, and the labelled ones (N, K).

        No image is decoded.
        """
        count = len(self)
        scale_N, radians_N, flip_N, _ = draw(count, None, None)
        to_image_N23 = self._to_image(np.arange(count), scale_N, radians_N, flip_N)
        return apply_affine(invert_affine(to_image_N23), self._points_NK2), self._labelled_NK.copy()

    def head_sizes(self) -> np.ndarray:
        """Head sizes in the pixels of the plain crops, float64 (N,); NaN where unknown."""
        sizes_N: np.ndarray = self._head_N * self.size / self._side_N
        return sizes_N

    def _to_image(
        self, index_B: np.ndarray, scale_B: np.ndarray, radians_B: np.ndarray, flip_B: np.ndarray
    ) -> np.ndarray:
        """(B, 2, 3) maps crop -> image: centre to centre, turned, scaled, mirrored."""
        pixel_B = self._side_N[index_B] * scale_B / self.size
        cos_B, sin_B = np.cos(radians_B) * pixel_B, np.sin(radians_B) * pixel_B
        sign_B = np.where(flip_B, -1.0, 1.0)
        to_image_B23 = np.empty((len(index_B), 2, 3))
        to_image_B23[:, 0, 0] = cos_B * sign_B
        to_image_B23[:, 0, 1] = -sin_B
        to_image_B23[:, 1, 0] = sin_B * sign_B
        to_image_B23[:, 1, 1] = cos_B
        middle = (self.size - 1) / 2
        to_image_B23[:, :, 2] = self._centre_N2[index_B] - to_image_B23[:, :, :2].sum(2) * middle
        return to_image_B23

    def _warp(self, index: int, to_image_23: np.ndarray, out_HW3: np.ndarray) -> None:
        base = self._base(index)
        to_base_23 = to_image_23 * np.array(base.scale_2)[:, None]
        to_base_23[:, 2] += base.offset_2
        cv2.warpAffine(
            base.pixels_HW3,
            to_base_23,
            (self.size, self.size),
            dst=out_HW3,
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT,
        )

    def _base(self, index: int) -> BaseCrop:
        kept = self._cache.get(index)
        if kept is not None:
            return kept
        base = self._from_disk(index) if self._disk is not None else self._decoded(index)
        with self._lock:
            num_bytes = base.pixels_HW3.nbytes
            if index not in self._cache and self.cached_bytes + num_bytes <= self._budget_bytes:
                self._cache[index] = base
                self.cached_bytes += num_bytes
        return base

    def _decoded(self, index: int) -> BaseCrop:
        image_HW3 = read_image(self._annotations[index].image, oriented=self._oriented)
        with self._lock:
            self.num_decoded += 1
        return cut(image_HW3, self._centre_N2[index], float(self._side_N[index]), self.size)

    def _from_disk(self, index: int) -> BaseCrop:
        """The neighbourhood that some process has kept, else decoded and kept for the others."""
        assert self._disk is not None
        path = self._annotations[index].image
        try:
            # Read before the image is: should it change in between, the new one has another key.
            status = path.stat()
        except OSError:
            return self._decoded(index)  # which says what is wrong
        key = DiskCache.key(
            os.path.abspath(path),
            status.st_mtime_ns,
            status.st_size,
            self._oriented,
            *self._centre_N2[index].tolist(),
            float(self._side_N[index]),
            self.size,
            CUT_FORM,
        )
        kept = self._disk.get(key)
        if kept is not None:
            return BaseCrop(*kept)
        base = self._decoded(index)
        if base.is_worth_disk:
            self._disk.put(key, base.pixels_HW3, base.scale_2, base.offset_2)
        return base


class CropSubset:
    """Some of the crops of a `Crops`, with indices of its own and the same cached pixels."""

    def __init__(self, crops: Crops, members: Sequence[int]) -> None:
        self._crops = crops
        self.size = crops.size
        self.flip_order = crops.flip_order
        self._members = [int(member) for member in members]

    def __len__(self) -> int:
        return len(self._members)

    def batch(
        self,
        indices: Sequence[int],
        *,
        augmentation: Augmentation | None = None,
        generator: np.random.Generator | None = None,
    ) -> CropBatch:
        """As `Crops.batch`, with indices into the subset."""
        return self._crops.batch(
            [self._members[index] for index in indices],
            augmentation=augmentation,
            generator=generator,
        )


def crop_square(annotation: Annotation, scheme: LandmarkScheme) -> tuple[np.ndarray, float]:
    """Centre (x, y) and side of the plain crop, in image pixels.

    Raises:
        UserError: the box has no area or is not finite.
    """
    x, y, width, height = annotation.box_xywh
    if not (all(map(math.isfinite, annotation.box_xywh)) and max(width, height) > 0):
        raise UserError(
            f"{annotation.image}: expected a box with an area, found {annotation.box_xywh}"
        )
    factor = 1.0 if annotation.box_origin == "image" else scheme.crop_factor
    return np.array([x + width / 2, y + height / 2]), max(width, height) * factor
