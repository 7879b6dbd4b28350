"""Training on all the data of one machine: epochs, evaluation, checkpoints, resume."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fedcunet.config import RunConfig
from fedcunet.data import AnnotationSet
from fedcunet.errors import UserError
from fedcunet.files import held, json_text, write_atomically
from fedcunet.training.checkpoint import load_checkpoint, save_checkpoint, to_device
from fedcunet.training.distributed import Team
from fedcunet.training.evaluation import Evaluation, check_scorable, evaluate
from fedcunet.training.local import (
    LocalResult,
    augmentation_of,
    batches,
    crops_of,
    make_optimizer,
    set_learning_rate,
    train_pass,
)
from fedcunet.training.network import build_network
from fedcunet.training.schedule import (
    has_fixed_length,
    norm_is_frozen,
    rate_factor,
    weight_share,
)
from fedcunet.training.training_log import TrainingLog, open_training_log

LAST, BEST, HISTORY, TENSORBOARD = (
    "last.safetensors",
    "best.safetensors",
    "history.jsonl",
    "tensorboard",
)
# Of an epoch: the optimiser's state, and of each process of a team what coding its gradients lost.
_OPTIMIZER, _LOST = "optimizer-{epoch}.safetensors", "lost-{epoch}-{rank}.safetensors"

# What a training that is resumed may set anew: its length, and what changes no result.
MAY_CHANGE = ("training.epochs", "data.cache-bytes", "data.cache-dir", "data.disk-cache-bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """What an epoch did."""

    epoch: int  # from 1
    result: LocalResult
    evaluation: Evaluation
    learning_rate: float
    weight_share: float  # of the way to 1 or 2 bits; they are evaluated with all of these
    is_best: bool
    best_percent: float  # of all epochs so far, those before a resume too


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
    team: Team | None = None,
) -> nn.Module:
    """Trains the setting's network; checkpoints, history and TensorBoard logs go into `out`.

    The optimiser's state is saved beside the last checkpoint, and everything random follows from
    the seed and the epoch: a training that is resumed ends as one that was never interrupted. An
    epoch is done once its last checkpoint is in place. It is written after everything else of the
    epoch and names the optimiser's file by its epoch, so that a training that is killed in between
    goes on from the epoch before.

    Args:
        config: the setting.
        train_set: what is trained on.
        test_set: what every epoch is judged by; the best checkpoint is its best.
        out: folder of the checkpoints.
        device: torch's name of the device.
        resume: go on from `out`.
        on_step: called with epoch, steps done in it, steps of an epoch, loss.
        on_epoch: called after each epoch.
        team: the processes that train together; the first of them evaluates and writes.

    Raises:
        UserError: if there is nothing to resume, a training is there and `resume` is not set,
            another process trains there, or no test image can be scored.
    """
    check_scorable(test_set)
    with ExitStack() as stack:
        if team is None or not team.rank:
            stack.enter_context(held(out))
        crops, test_crops = (crops_of(config.data, found) for found in (train_set, test_set))
        torch.set_num_threads(config.training.threads)
        model = build_network(config, train_set.scheme.num_landmarks)
        first_epoch, best = 1, None
        if resume:
            first_epoch, best = _resume(out, model, config, team)
        elif (out / LAST).exists() or (out / BEST).exists():
            raise UserError(
                f"{out}: holds a training already; go on with --resume, or name another"
            )
        to_device(model, device)
        trained = model if team is None else team.replica(model)
        training = config.training
        optimizer = make_optimizer(model, training, training.learning_rate)
        if resume:
            _load_optimizer(optimizer_path(out, first_epoch - 1), model, optimizer)
        num_images = len(crops) if team is None else team.share_size(len(crops))
        steps = len(batches(range(num_images), training.batch_size))  # of an epoch
        if first_epoch > training.epochs:
            return model
        log = TrainingLog(None)
        if team is None or not team.rank:
            _remove_unfinished(out)
            _cut_history(out / HISTORY, first_epoch - 1)
            steps_done = (first_epoch - 1) * steps
            log = stack.enter_context(open_training_log(out / TENSORBOARD, steps_done=steps_done))
        for epoch in range(first_epoch, training.epochs + 1):
            rate = training.learning_rate * rate_factor(
                training.schedule,
                epoch=epoch - 1,
                num_epochs=training.epochs,
                is_face=train_set.scheme.is_face,
            )
            way = weight_share(config, done=epoch - 1, total=training.epochs)
            set_learning_rate(optimizer, rate, weight_share=way)
            result = train_pass(
                trained,
                crops if team is None else team.share(crops, epoch),
                optimizer,
                batch_size=training.batch_size,
                num_epochs=1,
                sigma=config.data.sigma,
                augmentation=augmentation_of(config.data, train_set.scheme),
                seed=(config.seed, epoch) if team is None else (config.seed, epoch, team.rank),
                weight_share=way,
                freeze_norm=norm_is_frozen(config, done=epoch - 1, total=training.epochs),
                progress=_step_reporter(log, on_step, epoch),
            )
            if team is not None:
                result = team.together(result)
                team.average_statistics(model)
                _save_lost(out, epoch, model, team)
                if team.rank:
                    continue  # the first process evaluates and writes
            evaluation = evaluate(model, test_set, test_crops, flip_test=config.data.flip_test)
            # Errors are better when smaller, shares of correct points when larger.
            merit = (-1 if train_set.scheme.is_face else 1) * evaluation.percent
            is_best = best is None or merit > best
            best = merit if best is None else max(best, merit)
            facts = {"epoch": str(epoch), "percent": repr(evaluation.percent), "best": repr(best)}
            facts |= {} if team is None else team.facts()
            if is_best:
                save_checkpoint(out / BEST, model, config, train_set.scheme, facts)
            _save_optimizer(optimizer_path(out, epoch), model, optimizer)
            done = Epoch(
                epoch=epoch,
                result=result,
                evaluation=evaluation,
                learning_rate=rate,
                weight_share=way,
                is_best=is_best,
                best_percent=abs(best),
            )
            _record(out / HISTORY, log, epoch * steps, done, team)
            save_checkpoint(out / LAST, model, config, train_set.scheme, facts)  # the epoch is done
            _remove_states(out, epoch)
            if on_epoch is not None:
                on_epoch(done)
        return model


def optimizer_path(out: Path, epoch: int) -> Path:
    """The file of the optimiser's state after `epoch`."""
    return out / _OPTIMIZER.format(epoch=epoch)


def _step_reporter(
    log: TrainingLog, on_step: Callable[[int, int, int, float], None] | None, epoch: int
) -> Callable[[int, int, float], None]:
    """Logs the loss of each step, and tells who watches."""

    def report(done: int, total: int, loss: float) -> None:
        log.add((epoch - 1) * total + done, {"train/step_loss": loss})
        if on_step is not None:
            on_step(epoch, done, total, loss)

    return report


def _remove_unfinished(out: Path) -> None:
    """Removes files that a killed training was writing."""
    for pattern in (LAST, BEST, HISTORY, "optimizer-*", "lost-*"):
        for path in out.glob(f".{pattern}.*"):
            path.unlink()


def _resume(
    out: Path, model: nn.Module, config: RunConfig, team: Team | None
) -> tuple[int, float | None]:
    """Loads the last checkpoint into `model`; returns the next epoch and the best merit so far."""
    checkpoint = load_checkpoint(out / LAST)
    before, now = checkpoint.config.flat(), config.flat()
    may_change = set(MAY_CHANGE)
    if has_fixed_length(config):
        may_change.remove("training.epochs")
    changed = [key for key in now if before[key] != now[key] and key not in may_change]
    if changed:
        words = "; ".join(f"{key} {before[key]}, found {now[key]}" for key in changed)
        if changed == ["training.epochs"]:
            words += " (by which its schedule, ramp or freeze-norm goes)"
        raise UserError(f"{out / LAST}: expected the setting it was trained with, {words}")
    if not {"epoch", "best"} <= checkpoint.facts.keys():
        raise UserError(f"{out / LAST}: expected the checkpoint of a training, found another one")
    model.load_state_dict(checkpoint.model.state_dict())
    epoch, best = int(checkpoint.facts["epoch"]), float(checkpoint.facts["best"])
    exchange = checkpoint.facts.get("exchange", "none")
    wanted = "none" if team is None else team.facts()["exchange"]
    if exchange != wanted:
        raise UserError(
            f"{out / LAST}: expected the exchange it was trained with, {exchange}, found {wanted}"
        )
    if team is not None:
        path = out / _LOST.format(epoch=epoch, rank=team.rank)
        team.restore(model, checkpoint.facts, _tensors(path) if team.keeps_lost else {})
    return epoch + 1, best


def _save_lost(out: Path, epoch: int, model: nn.Module, team: Team) -> None:
    if team.keeps_lost:
        path = out / _LOST.format(epoch=epoch, rank=team.rank)
        write_atomically(path, lambda temporary: save_file(team.lost(model), temporary))
        team.wait()


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
    fused = bool(optimizer.defaults.get("fused"))  # steps are counted where the parameters lie
    for name, value in _tensors(path).items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters[parameter_name]
        # The state lies as the parameter does, or the next step's sums come out otherwise.
        if value.shape == parameter.shape and value.dim() == 4:
            value = value.to(memory_format=torch.channels_last)
        stays = key == "step" and not fused
        optimizer.state[parameter][key] = value if stays else value.to(parameter.device)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from None


def _remove_states(out: Path, epoch: int) -> None:
    """Removes the states of other epochs than the last."""
    kept = {optimizer_path(out, epoch), *out.glob(_LOST.format(epoch=epoch, rank="*"))}
    for name in (_OPTIMIZER.format(epoch="*"), _LOST.format(epoch="*", rank="*")):
        for path in out.glob(name):
            if path not in kept:
                path.unlink()


def _cut_history(path: Path, epochs_done: int) -> None:
    """Takes back the lines of epochs that a killed training had begun and not done."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if len(lines) > epochs_done:
            write_atomically(path, "".join(lines[:epochs_done]))


def _record(path: Path, log: TrainingLog, steps_done: int, epoch: Epoch, team: Team | None) -> None:
    """Appends the epoch's line to the history, and its values to the log."""
    evaluation, result = epoch.evaluation, epoch.result
    line = {
        "epoch": epoch.epoch,
        "loss": result.loss,
        evaluation.metric_name: evaluation.percent,
        "learning_rate": epoch.learning_rate,
        "weight_share": epoch.weight_share,
        "seconds": result.seconds,
        "images_per_second": result.num_examples / result.seconds,
    }
    if team is not None:
        line |= {"processes": team.size, "gradient_bytes_per_step": team.bytes_per_step()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json_text(line) + "\n")
    values = {
        "train/loss": result.loss,
        "train/learning_rate": epoch.learning_rate,
        "train/weight_share": epoch.weight_share,
        "train/images_per_second": line["images_per_second"],
        f"evaluation/{evaluation.metric_name}": evaluation.percent,
        "epoch": epoch.epoch,
    }
    log.add(steps_done, values)
    log.flush()
