"""Prediction, and the figures that judge it. B batch, K landmarks, N images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedcunet import metrics
from fedcunet.data.annotations import AnnotationSet
from fedcunet.data.crops import Crops, CropSubset
from fedcunet.data.heatmaps import decode_heatmaps
from fedcunet.data.prefetch import prefetched
from fedcunet.errors import UserError
from fedcunet.training.local import STRIDE
from fedcunet.training.losses import supervisions_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Accuracy on a set of images; percentages."""

    metric_name: str  # nme_percent, pck_percent or pckh_percent
    percent: float
    error_N: np.ndarray  # each image's NME, or its mean distance over the metric's length, percent
    per_landmark_K: np.ndarray  # NME, or share of correct landmarks, of each landmark
    auc: float | None  # of the NME below 8 %, faces only
    failure_percent: float | None  # share of images with NME above 8 %, faces only
    joint_mean_percent: float | None = None  # people: plain mean of the joints' own shares
    # People: shares of the usual tables' rows, head to ankle; NaN where no such joint is labelled.
    joints_percent: dict[str, float] | None = None
    images_left_out: int = 0  # that cannot be scored; their `error_N` is NaN


# Of a batch that is predicted on: the maps of DU-Net(4) take 78 MB. With half as many, oneDNN sums
# in an order that depends on the number of threads, and quantised maps amplify that.
PIXELS = 2**17
# What an image needs to be scored, by metric.
_NEEDED = {
    "nme": "outer eye corners that are apart",
    "pck": "a labelled torso",
    "pckh": "a head size and labelled joints",
}


@torch.no_grad()
def predict_batches(
    model: nn.Module,
    crops: Crops | CropSubset,
    *,
    flip_test: bool = False,
    flip_order: Sequence[int] | None = None,
) -> Iterator[tuple[range, np.ndarray, np.ndarray]]:
    """Predicts batch by batch, from the last supervised U-Net's heatmaps.

    A batch has `PIXELS`, or is one crop: its float32 maps are not to take many times the memory of
    a training step at low bits.

    Args:
        model: on its device.
        crops: what is predicted on, as they are.
        flip_test: take the mean of these heatmaps and of those of the mirrored crops, mirrored
            back (Newell et al., ECCV 2016, section 4.1), at twice the time.
        flip_order: of the model's landmarks, where they are not those of the crops.

    Yields:
        Indices, points (B, K, 2) float64 in crop pixels, and the maps from crop to image
        pixels (B, 2, 3).
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    order_K = crops.flip_order if flip_order is None else np.array(flip_order)
    flip_order_K = torch.from_numpy(order_K).to(device)
    count, batch_size = len(crops), max(1, PIXELS // crops.size**2)
    plan = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    for indices, batch in zip(plan, prefetched(crops.batch, plan), strict=True):
        images_B3HW = batch.images_B3HW.to(device, memory_format=torch.channels_last)
        heatmap_BKHW = _heatmaps(model, images_B3HW)
        if flip_test:
            mirrored_BKHW = _heatmaps(model, images_B3HW.flip(3))
            heatmap_BKHW = (heatmap_BKHW + mirror_heatmaps(mirrored_BKHW, flip_order_K)) / 2
        points_BK2 = decode_heatmaps(heatmap_BKHW, stride=STRIDE)
        yield indices, points_BK2.cpu().numpy().astype(np.float64), batch.to_image_B23
    model.train(was_training)


def mirror_heatmaps(heatmap_BKHW: torch.Tensor, flip_order_K: torch.Tensor) -> torch.Tensor:
    """The heatmaps of the mirrored crop: pixels mirrored, left and right landmarks exchanged.

    A crop of W pixels mirrors x to W - 1 - x. A heatmap pixel is `STRIDE` whole crop pixels wide,
    so its columns mirror alike and nothing needs to be shifted.
    """
    return heatmap_BKHW[:, flip_order_K].flip(3)


def _heatmaps(model: nn.Module, images_B3HW: torch.Tensor) -> torch.Tensor:
    """Of the last supervised U-Net, in [0, 1] where they are logits."""
    heatmap_BKHW: torch.Tensor = model(images_B3HW)[-1].float()
    is_detection = supervisions_of(model)[-1] == "detection"
    return heatmap_BKHW.sigmoid() if is_detection else heatmap_BKHW


def predict(
    model: nn.Module,
    crops: Crops | CropSubset,
    *,
    flip_test: bool = False,
    flip_order: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Points (N, K, 2) of all crops, float64 in crop pixels; see `predict_batches`."""
    points = []
    for indices, points_BK2, _ in predict_batches(
        model, crops, flip_test=flip_test, flip_order=flip_order
    ):
        points.append(points_BK2)
        if progress is not None:
            progress(indices.stop, len(crops))
    return np.concatenate(points)


def score(
    predicted_NK2: np.ndarray,
    target_NK2: np.ndarray,
    labelled_NK: np.ndarray,
    metric: str,
    head_size_N: np.ndarray | None = None,
) -> Evaluation:
    """The metric of the data set: `nme` (inter-ocular), `pck` (0.2 of the torso) or `pckh`.

    All coordinates of an image are in one frame; the metrics do not depend on its scale. Images
    without the length that the metric divides by are left out (`scored_images`); one at least is
    needed. `pckh` is PCKh@0.5: in percent its mean over joint instances (MPII toolkit, HRNet), and
    as `joint_mean_percent` the mean over joints (pytorch-pose, the paper's code).

    Args:
        predicted_NK2: predictions.
        target_NK2: ground truth.
        labelled_NK: bool.
        metric: as in the landmark scheme.
        head_size_N: needed by `pckh`, in the pixels of the points.
    """
    scored_N = scored_images(target_NK2, labelled_NK, metric, head_size_N)
    left_out = int((~scored_N).sum())
    if metric == "nme":
        predicted_MK2, target_MK2 = predicted_NK2[scored_N], target_NK2[scored_N]
        nme_M = metrics.nme_per_image(predicted_MK2, target_MK2)
        distance_MK = np.linalg.norm(predicted_MK2 - target_MK2, axis=2)
        ocular_M1 = np.linalg.norm(target_MK2[:, 36] - target_MK2[:, 45], axis=1)[:, None]
        error_N = np.full(len(scored_N), np.nan)
        error_N[scored_N] = 100 * nme_M
        return Evaluation(
            metric_name="nme_percent",
            percent=metrics.nme_percent(predicted_MK2, target_MK2),
            error_N=error_N,
            per_landmark_K=100 * (distance_MK / ocular_M1).mean(axis=0),
            auc=metrics.auc(nme_M),
            failure_percent=metrics.failure_percent(nme_M),
            images_left_out=left_out,
        )
    labelled_NK = labelled_NK & scored_N[:, None]
    if metric == "pckh":
        assert head_size_N is not None  # or nobody could be scored
        rates = metrics.pckh(predicted_NK2, target_NK2, labelled_NK, head_size_N)
        length_N1, rows = head_size_N[:, None], metrics.MPII_GROUPS
    else:
        rates = metrics.pck(predicted_NK2, target_NK2, labelled_NK)
        length_N1 = np.linalg.norm(target_NK2[:, 9] - target_NK2[:, 2], axis=1)[:, None]
        rows = metrics.LSP_GROUPS
    distance_NK = np.linalg.norm(predicted_NK2 - target_NK2, axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        share_NK = np.where(labelled_NK, distance_NK / length_N1, 0.0)
        error_N = 100 * share_NK.sum(axis=1) / labelled_NK.sum(axis=1)
    return Evaluation(
        metric_name=f"{metric}_percent",
        percent=rates.weighted,
        error_N=error_N,
        per_landmark_K=np.asarray(rates.per_joint),
        auc=None,
        failure_percent=None,
        joint_mean_percent=rates.joint_mean,
        joints_percent=rates.groups(rows),
        images_left_out=left_out,
    )


def scored_images(
    target_NK2: np.ndarray,
    labelled_NK: np.ndarray,
    metric: str,
    head_size_N: np.ndarray | None = None,
) -> np.ndarray:
    """Which images have what `score` needs (N,) bool: a length to divide by, joints that count."""
    if metric == "pckh":
        if head_size_N is None:
            raise ValueError("pckh: expected the head sizes of all people, found none")
        counted_NK = np.delete(labelled_NK, metrics.MPII_LEFT_OUT, axis=1)
        known_N = np.isfinite(head_size_N) & (head_size_N > 0)
        return np.asarray(known_N & counted_NK.any(axis=1))
    ends = (36, 45) if metric == "nme" else (9, 2)
    length_N = np.linalg.norm(target_NK2[:, ends[0]] - target_NK2[:, ends[1]], axis=1)
    return np.asarray((length_N > 0) & labelled_NK[:, ends].all(axis=1))


def scorable(found: AnnotationSet) -> np.ndarray:
    """`scored_images` of a data set's annotations."""
    annotations = found.annotations
    return scored_images(
        np.array([one.points_K2 for one in annotations]),
        np.array([one.labelled_K for one in annotations]),
        found.scheme.metric,
        np.array([one.head_size for one in annotations]),
    )


def check_scorable(found: AnnotationSet) -> None:
    """Raises UserError if none of the images can be scored."""
    if not scorable(found).any():
        raise UserError(
            f"{found.name} subset '{found.subset}': expected images that can be scored, with "
            f"{_NEEDED[found.scheme.metric]}, found none among {len(found.annotations)}"
        )


def score_crops(predicted_NK2: np.ndarray, crops: Crops, metric: str) -> Evaluation:
    """`score` of predictions in the pixels of the plain crops."""
    target_NK2, labelled_NK = crops.targets()
    return score(predicted_NK2, target_NK2, labelled_NK, metric, crops.head_sizes())


def evaluate(
    model: nn.Module,
    test_set: AnnotationSet,
    crops: Crops,
    *,
    landmarks: Sequence[int] | None = None,
    flip_test: bool = False,
    flip_order: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """The accuracy of `model` on the plain crops of `test_set`; see `predict_batches`.

    A model of another scheme needs `landmarks`, which of its landmarks are those of `test_set`, and
    for the flip test its own `flip_order`.

    Raises:
        UserError: none of the images can be scored.
    """
    check_scorable(test_set)
    predicted_NK2 = predict(
        model, crops, flip_test=flip_test, flip_order=flip_order, progress=progress
    )
    if landmarks is not None:
        predicted_NK2 = predicted_NK2[:, list(landmarks)]
    return score_crops(predicted_NK2, crops, test_set.scheme.metric)


def evaluate_mean_shape(train_crops: Crops, test_set: AnnotationSet, crops: Crops) -> Evaluation:
    """The accuracy of predicting the mean training shape in every crop: what a blind guess has.

    Raises:
        UserError: none of the images can be scored.
    """
    check_scorable(test_set)
    shape_K2 = mean_shape(train_crops)
    guess_NK2 = np.broadcast_to(shape_K2, (len(crops), *shape_K2.shape))
    return score_crops(guess_NK2, crops, test_set.scheme.metric)


def mean_shape(train_crops: Crops) -> np.ndarray:
    """Mean of the labelled training points (K, 2) in crop pixels: what a blind guess predicts."""
    points_NK2, labelled_NK = train_crops.targets()
    weight_NK1 = labelled_NK[:, :, None].astype(np.float64)
    total_K1 = np.maximum(weight_NK1.sum(axis=0), 1)
    mean_K2: np.ndarray = (np.nan_to_num(points_NK2) * weight_NK1).sum(axis=0) / total_K1
    return mean_K2
