"""Training on all the data of one machine: epochs, evaluation, checkpoints, resume."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedcunet.config import RunConfig
from fedcunet.data import AnnotationSet
from fedcunet.errors import UserError
from fedcunet.files import write_atomically
from fedcunet.training.checkpoint import load_checkpoint, save_checkpoint, to_device
from fedcunet.training.evaluation import Evaluation, evaluate
from fedcunet.training.local import (
    OPTIMIZERS,
    LocalResult,
    augmentation_of,
    crops_of,
    train_pass,
)
from fedcunet.training.network import build_network
from fedcunet.training.schedule import rate_factor

LAST, BEST, OPTIMIZER, HISTORY = (
    "last.safetensors",
    "best.safetensors",
    "optimizer.safetensors",
    "history.jsonl",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """What an epoch did."""

    epoch: int  # from 1
    result: LocalResult
    evaluation: Evaluation
    learning_rate: float
    is_best: bool


def train_network(
    config: RunConfig,
    train_set: AnnotationSet,
    test_set: AnnotationSet,
    out: Path,
    *,
    device: str = "cpu",
    resume: bool = False,
    on_step: Callable[[int, int, int, float], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> nn.Module:
    """Trains the setting's network and writes `last`, `best` and `history.jsonl` into `out`.

    The optimiser's state is saved beside the last checkpoint, and everything random follows from
    the seed and the epoch: a training that is resumed ends as one that was never interrupted.

    Args:
        config: the setting.
        train_set: what is trained on.
        test_set: what every epoch is judged by; the best checkpoint is its best.
        out: folder of the checkpoints.
        device: torch's name of the device.
        resume: go on from `out`.
        on_step: called with epoch, steps done, steps of the epoch, loss.
        on_epoch: called after each epoch.

    Raises:
        UserError: if there is nothing to resume, or a training is there and `resume` is not set.
    """
    crops, test_crops = (crops_of(config.data, found) for found in (train_set, test_set))
    torch.set_num_threads(config.training.threads)
    model = build_network(config, train_set.scheme.num_landmarks)
    first_epoch, best = 1, None
    if resume:
        first_epoch, best = _resume(out, model, config)
    elif (out / LAST).exists():
        raise UserError(f"{out}: holds a training already; go on with --resume, or name another")
    to_device(model, device)
    training = config.training
    optimizer = OPTIMIZERS[training.optimizer](list(model.parameters()), training.learning_rate)
    if resume:
        _load_optimizer(out / OPTIMIZER, model, optimizer)
    for epoch in range(first_epoch, training.epochs + 1):
        rate = training.learning_rate * rate_factor(
            training.schedule,
            epoch=epoch - 1,
            num_epochs=training.epochs,
            is_face=train_set.scheme.is_face,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        result = train_pass(
            model,
            crops,
            optimizer,
            batch_size=training.batch_size,
            num_epochs=1,
            sigma=config.data.sigma,
            augmentation=augmentation_of(config.data, train_set.scheme),
            seed=(config.seed, epoch),
            progress=_step_reporter(on_step, epoch),
        )
        evaluation = evaluate(model, test_set, test_crops, flip_test=config.data.flip_test)
        # Errors are better when smaller, shares of correct points when larger.
        merit = (-1 if train_set.scheme.is_face else 1) * evaluation.percent
        is_best = best is None or merit > best
        best = merit if best is None else max(best, merit)
        facts = {"epoch": str(epoch), "percent": repr(evaluation.percent), "best": repr(best)}
        if is_best:
            save_checkpoint(out / BEST, model, config, train_set.scheme, facts)
        _save_optimizer(out / OPTIMIZER, model, optimizer)
        save_checkpoint(out / LAST, model, config, train_set.scheme, facts)
        _log(out / HISTORY, epoch, result, evaluation, rate)
        if on_epoch is not None:
            on_epoch(
                Epoch(
                    epoch=epoch,
                    result=result,
                    evaluation=evaluation,
                    learning_rate=rate,
                    is_best=is_best,
                )
            )
    return model


def _step_reporter(
    on_step: Callable[[int, int, int, float], None] | None, epoch: int
) -> Callable[[int, int, float], None] | None:
    if on_step is None:
        return None
    return lambda done, total, loss: on_step(epoch, done, total, loss)


def _resume(out: Path, model: nn.Module, config: RunConfig) -> tuple[int, float | None]:
    """Loads the last checkpoint into `model`; returns the next epoch and the best merit so far."""
    checkpoint = load_checkpoint(out / LAST)
    if checkpoint.config.replace(training__epochs=config.training.epochs) != config:
        changed = [
            key
            for key, value in config.flat().items()
            if checkpoint.config.flat()[key] != value and key != "training.epochs"
        ]
        raise UserError(f"{out / LAST}: was trained with another {', '.join(changed)}")
    model.load_state_dict(checkpoint.model.state_dict())
    return int(checkpoint.facts["epoch"]) + 1, float(checkpoint.facts["best"])


def _save_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    names: dict[object, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"{names[parameter]}/{key}": torch.as_tensor(value).contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    write_atomically(path, lambda temporary: save_file(tensors, temporary))


def _load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    try:
        tensors = load_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    for name, value in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters[parameter_name]
        # The state lies as the parameter does, or the next step's sums come out otherwise.
        if value.shape == parameter.shape and value.dim() == 4:
            value = value.to(memory_format=torch.channels_last)
        optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)


def _log(
    path: Path, epoch: int, result: LocalResult, evaluation: Evaluation, learning_rate: float
) -> None:
    line = {
        "epoch": epoch,
        "loss": result.loss,
        evaluation.metric_name: evaluation.percent,
        "learning_rate": learning_rate,
        "seconds": result.seconds,
        "images_per_second": result.num_examples / result.seconds,
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
