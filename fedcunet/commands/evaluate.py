"""The command `evaluate`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedcunet.commands.options import (
    BoxesOption,
    CheckpointOption,
    DataOption,
    DeviceOption,
    FlipTestOption,
    JsonOption,
    RootOption,
    load_subset,
    progress_bar,
)
from fedcunet.config import DataConfig
from fedcunet.data import AnnotationSet, load
from fedcunet.data.annotations import landmarks_in
from fedcunet.data.crops import Crops
from fedcunet.errors import UserError
from fedcunet.files import json_text
from fedcunet.training.checkpoint import Checkpoint, load_checkpoint, to_device
from fedcunet.training.evaluation import evaluate as evaluate_network
from fedcunet.training.evaluation import evaluate_mean_shape
from fedcunet.training.local import crops_of


def evaluate(
    checkpoint: CheckpointOption,
    data: DataOption,
    root: RootOption,
    subset: Annotated[
        str,
        typer.Option(
            "--subset", help="test; faces also common, challenge, full, private, a folder."
        ),
    ] = "test",
    boxes: BoxesOption = "landmarks",
    flip_test: FlipTestOption = False,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Measures a checkpoint on a data set, beside predicting the mean training shape."""
    loaded = load_checkpoint(checkpoint)
    test_set = load_subset(data, root, subset, boxes)
    landmarks = _landmarks(loaded, checkpoint, test_set)
    crops = _crops(loaded, test_set)
    to_device(loaded.model, device)
    with progress_bar(Console(stderr=True)) as progress:
        bar = progress.add_task("images", total=len(crops))
        found = evaluate_network(
            loaded.model,
            test_set,
            crops,
            landmarks=landmarks,
            flip_test=flip_test,
            flip_order=loaded.scheme.flip_order,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    result: dict[str, Any] = {
        "images": len(crops),
        "images_left_out": found.images_left_out,
        found.metric_name: found.percent,
        "joint_mean_percent": found.joint_mean_percent,
        "joints_percent": found.joints_percent,
        "per_landmark": [round(float(value), 4) for value in found.per_landmark_K],
        "auc": found.auc,
        "failure_percent": found.failure_percent,
        "mean_shape_percent": _mean_shape_percent(loaded, test_set, crops, data, root, boxes),
        "boxes": _boxes_text(test_set),
    }
    if as_json:
        print(json_text(result))
        return
    title = f"{checkpoint} on {test_set.name} '{subset}'"
    table = Table(title=title, box=None, show_header=False)
    shown = {
        key: one for key, one in result.items() if key not in ("per_landmark", "joints_percent")
    }
    shown |= {f"  {name}": share for name, share in (found.joints_percent or {}).items()}
    for name, value in shown.items():
        if value is None:
            continue
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)


def _landmarks(loaded: Checkpoint, path: Path, found: AnnotationSet) -> tuple[int, ...]:
    """Which of the network's landmarks are those of the data set; says so where they differ."""
    trained, wanted = loaded.scheme, found.scheme
    landmarks = landmarks_in(trained, wanted)
    if landmarks is None:
        raise UserError(
            f"checkpoint {path}: trained on {trained.name}, {found.name} has {wanted.name}"
        )
    if trained.name != wanted.name:
        Console(stderr=True, highlight=False).print(
            f"{path}: trained on {trained.name}; of its {trained.num_landmarks} landmarks the "
            f"{wanted.num_landmarks} of {wanted.name} are scored",
            markup=False,
            soft_wrap=True,
        )
    return landmarks


def _crops(loaded: Checkpoint, found: AnnotationSet) -> Crops:
    # Of the checkpoint's setting the size alone: a file from elsewhere names no folder to write to.
    return crops_of(DataConfig(size=loaded.config.data.size), found)


def _mean_shape_percent(
    loaded: Checkpoint,
    test_set: AnnotationSet,
    crops: Crops,
    data: str,
    root: str,
    boxes: str,
) -> float | None:
    """The same metric for the mean training shape; None where there is no training part."""
    try:
        train_set = load(data, root, loaded.config.data.train_subset, boxes=boxes)
    except UserError:
        return None
    if not train_set.annotations:
        return None
    return evaluate_mean_shape(_crops(loaded, train_set), test_set, crops).percent


def _boxes_text(found: AnnotationSet) -> str:
    scheme = found.scheme
    origins = {annotation.box_origin for annotation in found.annotations}
    if origins == {"landmarks"}:
        return f"square landmark box x {scheme.crop_factor}"
    return f"{' and '.join(sorted(origins))} box x {scheme.crop_factor}"
