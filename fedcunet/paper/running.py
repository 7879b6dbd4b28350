"""Trains the networks of a table, each in a folder of its own, and takes up what is there."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedcunet.config import RunConfig
from fedcunet.data import AnnotationSet
from fedcunet.data.w300 import SUBSETS
from fedcunet.errors import UserError
from fedcunet.files import write_atomically
from fedcunet.paper.measures import exported_bytes, forward_seconds, parameter_counts
from fedcunet.training.central import HISTORY, LAST, Epoch, train_network
from fedcunet.training.checkpoint import Checkpoint, load_checkpoint
from fedcunet.training.evaluation import evaluate
from fedcunet.training.local import crops_of

SETTING, RESULT, TRAIN_CURVE = "setting.json", "result.json", "train-curve.json"

OnStep = Callable[[int, int, int, float], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowResult:
    """What one training came to."""

    percent: float  # of the last checkpoint; no checkpoint is chosen on the test set
    metric: str  # nme_percent, pckh_percent or pck_percent
    easy: float | None  # NME of the common subset (helen, lfpw), faces only
    hard: float | None  # NME of the challenge subset (ibug), faces only
    conv_parameters: int
    parameters: int
    bytes_float32: int  # the state
    bytes_packed: int  # length of the file of `fedcunet export --format packed`
    train_seconds: float
    train_images_per_second: float
    test_seconds_per_image: float  # a forward pass, without reading and cropping
    validation_curve: dict[str, float]  # percent on the test images by epoch
    train_curve: dict[str, float]  # percent on the training images by epoch, where asked for


def train_row(
    config: RunConfig,
    sets: tuple[AnnotationSet, AnnotationSet],
    out: Path,
    *,
    train_epochs: Sequence[int] = (),
    on_step: OnStep | None = None,
) -> RowResult:
    """The result of a setting: from `out` if it is there, else by training, from where it stopped.

    Args:
        config: the setting.
        sets: training and test images.
        out: the row's folder.
        train_epochs: after which the accuracy on the training images is measured too.
        on_step: as `train_network` takes it.

    Raises:
        UserError: if `out` holds the training of another setting or of other images.
    """
    train_set, test_set = sets
    check_setting(out, config, sets)
    if (out / RESULT).exists():
        return _read_result(out / RESULT)
    _write_json(out / SETTING, setting_of(config, sets))

    def after_epoch(epoch: Epoch) -> None:
        if epoch.epoch in train_epochs:
            _score_training(out, train_set, epoch.epoch)

    begun = (out / LAST).exists()
    if begun:
        last = int(load_checkpoint(out / LAST).facts["epoch"])
        if last in train_epochs:
            _score_training(out, train_set, last)
    train_network(
        config, train_set, test_set, out, resume=begun, on_step=on_step, on_epoch=after_epoch
    )
    result = _result(load_checkpoint(out / LAST), test_set, out)
    _write_json(out / RESULT, asdict(result))
    return result


def setting_of(config: RunConfig, sets: tuple[AnnotationSet, AnnotationSet]) -> dict[str, Any]:
    """What a row's folder must agree with before anything in it is used."""
    return {
        "config": config.flat(),
        "train_images": len(sets[0].annotations),
        "test_images": len(sets[1].annotations),
    }


def check_setting(out: Path, config: RunConfig, sets: tuple[AnnotationSet, AnnotationSet]) -> None:
    """Raises UserError if the folder holds a training of another setting or of other images."""
    if not (out / SETTING).exists():
        if (out / LAST).exists() or (out / RESULT).exists():
            raise UserError(f"{out}: expected {SETTING} beside its files; name another --out")
        return
    found, wanted = (_flat(value) for value in (read_json(out / SETTING), setting_of(config, sets)))
    changed = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if changed:
        shown = ", ".join(
            f"{key} {found.get(key)!r}, now {wanted.get(key)!r}" for key in changed[:3]
        )
        raise UserError(f"{out}: was trained with {shown}; name another --out, or remove it")


def is_finished(out: Path) -> bool:
    """Whether the folder holds a result."""
    return (out / RESULT).exists()


def _flat(setting: Mapping[str, Any]) -> dict[str, Any]:
    others = {key: value for key, value in setting.items() if key != "config"}
    # A key that came later was at its default.
    return RunConfig().flat() | dict(setting.get("config", {})) | others


def _score_training(out: Path, train_set: AnnotationSet, epoch: int) -> None:
    """Adds the accuracy of the last checkpoint on the training images to the row's curve."""
    curve = read_json(out / TRAIN_CURVE) if (out / TRAIN_CURVE).exists() else {}
    if str(epoch) in curve:
        return
    loaded = load_checkpoint(out / LAST)
    crops = crops_of(loaded.config.data, train_set)
    curve[str(epoch)] = evaluate(loaded.model, train_set, crops).percent
    _write_json(out / TRAIN_CURVE, curve)


def _result(loaded: Checkpoint, test_set: AnnotationSet, out: Path) -> RowResult:
    crops = crops_of(loaded.config.data, test_set)
    found = evaluate(loaded.model, test_set, crops)
    lines = (out / HISTORY).read_text(encoding="utf-8").splitlines()
    by_epoch = {int(line["epoch"]): line for line in map(json.loads, lines)}
    seconds = sum(line["seconds"] for line in by_epoch.values())
    images = sum(line["seconds"] * line["images_per_second"] for line in by_epoch.values())
    convolutions, parameters, state_bytes = parameter_counts(loaded.model)
    sources = [annotation.source for annotation in test_set.annotations]
    return RowResult(
        percent=found.percent,
        metric=found.metric_name,
        easy=_mean_of(found.error_N, sources, SUBSETS["common"], found.metric_name),
        hard=_mean_of(found.error_N, sources, SUBSETS["challenge"], found.metric_name),
        conv_parameters=convolutions,
        parameters=parameters,
        bytes_float32=state_bytes,
        bytes_packed=exported_bytes(loaded.model, loaded.config, loaded.scheme),
        train_seconds=seconds,
        train_images_per_second=images / seconds,
        test_seconds_per_image=forward_seconds(loaded.model, loaded.config.data.size),
        validation_curve={str(e): line[found.metric_name] for e, line in by_epoch.items()},
        train_curve=read_json(out / TRAIN_CURVE) if (out / TRAIN_CURVE).exists() else {},
    )


def _mean_of(
    error_N: np.ndarray, sources: Sequence[str], wanted: Sequence[str], metric: str
) -> float | None:
    chosen_N = np.array([source in wanted for source in sources]) & np.isfinite(error_N)
    if metric != "nme_percent" or not chosen_N.any():
        return None
    return float(error_N[chosen_N].mean())


def _read_result(path: Path) -> RowResult:
    try:
        return RowResult(**read_json(path))
    except TypeError as error:
        raise UserError(f"{path}: not a result of this version ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of a row's folder. Raises UserError if it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=1) + "\n")
