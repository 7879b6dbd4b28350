"""The commands `train`, `evaluate` and `predict`."""

import json
import math
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedcunet.commands.machine import (
    IterativeOption,
    ModelOption,
    OrderOption,
    SupervisionsOption,
    order_of,
)
from fedcunet.config import DataConfig, RunConfig, UpdateConfig
from fedcunet.data import DATASETS, Annotation, AnnotationSet, load
from fedcunet.data.annotations import LandmarkScheme, landmarks_in
from fedcunet.data.crops import Crops, apply_affine
from fedcunet.data.drawing import draw_landmarks
from fedcunet.data.images import read_image, write_image
from fedcunet.errors import UserError
from fedcunet.files import write_atomically
from fedcunet.training.central import BEST, Epoch, train_network
from fedcunet.training.checkpoint import Checkpoint, load_checkpoint, to_device
from fedcunet.training.distributed import Team, team_of_torchrun
from fedcunet.training.evaluation import evaluate as evaluate_network
from fedcunet.training.evaluation import evaluate_mean_shape, predict_batches
from fedcunet.training.local import crops_of
from fedcunet.training.training_log import has_tensorboard

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")

DataOption = Annotated[
    str,
    typer.Option("--data", help=f"Data set: {', '.join(DATASETS)}; several to train on: lsp+mpii."),
]
RootOption = Annotated[
    str, typer.Option("--root", help="Folder of the data set; of several: DIR1,DIR2.")
]
FlipTestOption = Annotated[
    bool,
    typer.Option(
        "--flip-test", help="Predict from the mean of each crop's and its mirror's heatmaps."
    ),
]
CheckpointOption = Annotated[
    Path, typer.Option("--checkpoint", help="A checkpoint file of this program.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
BoxesOption = Annotated[
    str, typer.Option("--boxes", help="Faces: landmarks (square box x 1.25) or given.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]


def train(
    data: DataOption,
    root: RootOption,
    out: Annotated[Path, typer.Option("--out", help="Folder for checkpoints and history.")],
    model: ModelOption = "dunet",
    unets: Annotated[int, typer.Option("--unets", help="Number of U-Nets, n.")] = 4,
    order: OrderOption = None,
    supervisions: SupervisionsOption = 0,
    supervision: Annotated[
        str, typer.Option("--supervision", help="regression, or detection.")
    ] = "regression",
    iterative: IterativeOption = False,
    refined_supervision: Annotated[
        str, typer.Option("--refined-supervision", help="Of the second pass.")
    ] = "regression",
    bits: Annotated[
        str, typer.Option("--bits", help="Inputs, weights, gradients: 8,1,8 or 32,32,32.")
    ] = "32,32,32",
    alpha: Annotated[bool, typer.Option("--alpha", help="Scale binary filters.")] = False,
    input_quantizer: Annotated[
        str,
        typer.Option("--input-quantizer", help="ranged, source, or paper (its literal form)."),
    ] = "ranged",
    gradient_scale: Annotated[
        str, typer.Option("--gradient-scale", help="A scale a channel, or a tensor.")
    ] = "channel",
    storage: Annotated[
        str,
        typer.Option("--storage", help="What a step keeps: float32, packed or frugal."),
    ] = "float32",
    size: Annotated[int, typer.Option("--size", help="Side of the crops, n x 64.")] = 256,
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the data.")] = 100,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Examples a step.")] = 16,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="The first.")] = 2.5e-4,
    schedule: Annotated[
        str, typer.Option("--schedule", help="paper, constant, cosine, or 30:0.2,60:0.5")
    ] = "paper",
    optimizer: Annotated[str, typer.Option("--optimizer", help="rmsprop, sgd, adam.")] = "rmsprop",
    boxes: BoxesOption = "landmarks",
    flip_test: FlipTestOption = False,
    threads: Annotated[int, typer.Option("--threads", help="Of torch.")] = 1,
    device: DeviceOption = "cpu",
    seed: Annotated[int, typer.Option("--seed", help="Of everything random.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from --out.")] = False,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="One of torchrun's processes; see --exchange.")
    ] = False,
    exchange: Annotated[
        str, typer.Option("--exchange", help="Codec of the gradients between processes.")
    ] = "float32",
    exchange_bits: Annotated[
        float, typer.Option("--exchange-bits", help="Of that codec, a gradient's value.")
    ] = 32,
    as_json: JsonOption = False,
) -> None:
    """Trains a network on one machine; the defaults are the paper's.

    Example: fedcunet train --data faces --root .fedcunet/data/faces --unets 2 --size 64
    --epochs 5 --bits 8,1,8 --alpha --learning-rate 1e-3 --out .fedcunet/train

    Several data sets: --data lsp+mpii --root LSP,MPII trains on the people of both, with the joints
    of the first, and evaluates on the first one's test images.

    --out gets best.safetensors (the best epoch), last.safetensors (to --resume from),
    history.jsonl (a line an epoch) and, where TensorBoard is installed, its logs in tensorboard/.
    Decoded crops are kept in .fedcunet/cache for the next training.
    """
    config = RunConfig().replace(
        seed=seed,
        model__kind=model,
        model__unets=unets,
        model__order=order_of(model, unets, order),
        model__supervisions=supervisions,
        model__supervision=supervision,
        model__iterative=iterative,
        model__refined_supervision=refined_supervision,
        quant__bits=bits,
        quant__alpha=alpha,
        quant__input_quantizer=input_quantizer,
        quant__gradient_scale=gradient_scale,
        quant__storage=storage,
        data__name=data,
        data__root=root,
        data__size=size,
        data__boxes=boxes,
        data__flip_test=flip_test,
        training__epochs=epochs,
        training__batch_size=batch_size,
        training__learning_rate=learning_rate,
        training__schedule=schedule,
        training__optimizer=optimizer,
        training__threads=threads,
    )
    train_set = _load(data, root, config.data.train_subset, boxes)
    test_set = _load(data, root, config.data.test_subset, boxes)
    epochs_done: list[Epoch] = []
    console = Console(stderr=True, highlight=False)
    if not has_tensorboard():
        console.print("no TensorBoard logs: pip install tensorboard gives them", markup=False)
    begin = time.monotonic()
    with ExitStack() as stack:
        team = stack.enter_context(_team(distributed, exchange, exchange_bits, seed, device))
        silent = team is not None and team.rank > 0
        console.quiet = silent
        progress = stack.enter_context(_progress(console))
        bar = progress.add_task("epoch 1", total=None)

        def on_step(epoch: int, done: int, total: int, loss: float) -> None:
            text = f"epoch {epoch}/{epochs}  loss {loss:.5f}{_best_text(epochs_done)}"
            # The bar and its time left are those of the whole training.
            done += (epoch - 1) * total
            progress.update(bar, completed=done, total=epochs * total, description=text)

        def on_epoch(epoch: Epoch) -> None:
            epochs_done.append(epoch)
            seconds = (time.monotonic() - begin) / len(epochs_done)
            line = _epoch_line(epoch, epochs, seconds * (epochs - epoch.epoch))
            console.print(line, soft_wrap=True)

        train_network(
            config,
            train_set,
            test_set,
            out,
            device=device if team is None else team.device,
            resume=resume,
            on_step=on_step,
            on_epoch=on_epoch,
            team=team,
        )
    if silent:
        return
    if not epochs_done:
        raise UserError(f"{out}: all of {epochs} epochs are done already; raise --epochs")
    last = epochs_done[-1].evaluation
    if as_json:
        result = {
            "epochs": epochs,
            "loss": epochs_done[-1].result.loss,
            last.metric_name: last.percent,
            f"best_{last.metric_name}": epochs_done[-1].best_percent,
            "out": str(out),
        }
        print(json.dumps(result))
    else:
        print(f"{out / BEST}: the best checkpoint, by {last.metric_name} on '{test_set.subset}'")


def _team(
    distributed: bool, exchange: str, exchange_bits: float, seed: int, device: str
) -> AbstractContextManager[Team | None]:
    """The team of this process, or none. Raises UserError where options contradict each other."""
    if not distributed:
        if exchange != "float32":
            raise UserError(f"--exchange {exchange}: expected --distributed beside it")
        return nullcontext()
    if device != "cpu":
        raise UserError(f"--device {device}: torchrun's processes find their devices themselves")
    update = UpdateConfig(codec=exchange, bits=exchange_bits, error_feedback=exchange != "float32")
    return team_of_torchrun(update, seed)


def evaluate(
    checkpoint: CheckpointOption,
    data: DataOption,
    root: RootOption,
    subset: Annotated[
        str, typer.Option("--subset", help="test, common, challenge, or a folder.")
    ] = "test",
    boxes: BoxesOption = "landmarks",
    flip_test: FlipTestOption = False,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Measures a checkpoint on a data set, beside predicting the mean training shape."""
    loaded = load_checkpoint(checkpoint)
    test_set = _load(data, root, subset, boxes)
    landmarks = _landmarks(loaded, checkpoint, test_set)
    crops = _crops(loaded, test_set)
    to_device(loaded.model, device)
    with _progress(Console(stderr=True)) as progress:
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
        found.metric_name: found.percent,
        "per_landmark": [_rounded(float(value)) for value in found.per_landmark_K],
        "auc": found.auc,
        "failure_percent": found.failure_percent,
        "mean_shape_percent": _mean_shape_percent(loaded, test_set, crops, data, root, boxes),
        "boxes": _boxes_text(test_set),
    }
    if as_json:
        print(json.dumps(result))
        return
    table = Table(title=f"{checkpoint} on {data} '{subset}'", box=None, show_header=False)
    names = [key for key in result if key != "per_landmark" and result[key] is not None]
    for name in names:
        value = result[name]
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)


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
    overwritten = {out.resolve() / f"{path.stem}.png" for path in images}
    overwritten &= {path.resolve() for path in images}
    if overwritten:
        raise UserError(
            f"--out {out}: {min(overwritten)} would be overwritten; name another folder"
        )
    points: dict[str, Any] = {}
    with _progress(Console(stderr=True)) as progress:
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


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _best_text(epochs: list[Epoch]) -> str:
    """The best figure so far, once there is one."""
    if not epochs:
        return ""
    return f"  best {epochs[-1].evaluation.metric_name} {epochs[-1].best_percent:.2f}"


def _epoch_line(epoch: Epoch, num_epochs: int, seconds_left: float) -> str:
    left = f"  {timedelta(seconds=round(seconds_left))} left" if epoch.epoch < num_epochs else ""
    rate = epoch.result.num_examples / epoch.result.seconds
    return (
        f"epoch {epoch.epoch}/{num_epochs}  loss {epoch.result.loss:.5f}  "
        f"{epoch.evaluation.metric_name} {epoch.evaluation.percent:.2f}"
        f"{' (best)' if epoch.is_best else ''}  rate {epoch.learning_rate:.2g}  "
        f"{rate:.0f} images/s{left}"
    )


def _load(data: str, root: str, subset: str, boxes: str) -> AnnotationSet:
    """The subset, its problems told on standard error. Raises UserError if it is empty."""
    found = load(data, root, subset, boxes=boxes)
    console = Console(stderr=True, highlight=False)
    for problem in found.problems[:5]:
        console.print(f"{subset}: {problem}", markup=False, soft_wrap=True)
    if len(found.problems) > 5:
        console.print(f"{subset}: {len(found.problems) - 5} more; see fedcunet data check")
    if not found.annotations:
        raise UserError(f"{root}: subset '{subset}' of {data} has no images")
    return found


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


def _rounded(value: float) -> float | None:
    """None for what JSON has no number for: the rate of a joint that nobody has."""
    return round(value, 4) if math.isfinite(value) else None


def _boxes_text(found: AnnotationSet) -> str:
    scheme = found.scheme
    origins = {annotation.box_origin for annotation in found.annotations}
    if origins == {"landmarks"}:
        return f"square landmark box x {scheme.crop_factor}"
    return f"{' and '.join(sorted(origins))} box x {scheme.crop_factor}"


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
        sides = box_width > 0 and box_height > 0
        if not (sides and x < width and y < height and x + box_width > 0 and y + box_height > 0):
            raise UserError(
                f"--box {box}: expected a box with an area that meets {path}, "
                f"{width}x{height} pixels"
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
