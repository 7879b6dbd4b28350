"""The command `train`."""

import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedcunet.commands.options import (
    BoxesOption,
    DataOption,
    DeviceOption,
    FlipTestOption,
    GradientScaleOption,
    IterativeOption,
    JsonOption,
    ModelOption,
    OptimizerOption,
    OrderOption,
    RootOption,
    SupervisionsOption,
    ThreadsOption,
    UnetsOption,
    load_subset,
    order_of,
    progress_bar,
)
from fedcunet.config import RunConfig, UpdateConfig
from fedcunet.errors import UserError
from fedcunet.files import json_text
from fedcunet.training.central import BEST, Epoch, train_network
from fedcunet.training.distributed import Team, team_of_torchrun
from fedcunet.training.schedule import has_fixed_length
from fedcunet.training.training_log import has_tensorboard


def train(
    data: DataOption,
    root: RootOption,
    out: Annotated[Path, typer.Option("--out", help="Folder for checkpoints and history.")],
    model: ModelOption = "dunet",
    unets: UnetsOption = 4,
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
    alpha: Annotated[
        bool, typer.Option("--alpha", help="A scale for each filter of 1 or 2 bits.")
    ] = False,
    input_quantizer: Annotated[
        str,
        typer.Option("--input-quantizer", help="source, ranged, or paper (its literal form)."),
    ] = "source",
    gradient_scale: GradientScaleOption = "channel",
    storage: Annotated[
        str,
        typer.Option("--storage", help="What a step keeps: float32, packed or frugal."),
    ] = "float32",
    size: Annotated[int, typer.Option("--size", help="Side of the crops, n x 64.")] = 256,
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the data.")] = 100,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Examples a step.")] = 16,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="The first.")] = 2.5e-4,
    latent_rate: Annotated[
        float, typer.Option("--latent-rate", help="Of weights at 1 or 2 bits, in learning rates.")
    ] = 1.0,
    ramp: Annotated[
        float, typer.Option("--ramp", help="Share of the training until weights have their bits.")
    ] = 0.0,
    freeze_norm: Annotated[
        float,
        typer.Option(
            "--freeze-norm",
            help="Share of the training, its last, in which BatchNorm keeps its statistics.",
        ),
    ] = 0.0,
    schedule: Annotated[
        str, typer.Option("--schedule", help="paper, constant, cosine, or 30:0.2,60:0.5")
    ] = "paper",
    optimizer: OptimizerOption = "rmsprop",
    boxes: BoxesOption = "landmarks",
    flip_test: FlipTestOption = False,
    threads: ThreadsOption = 1,
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

    Weights at 1 or 2 bits learn better in few epochs with --latent-rate 3 --ramp 0.5. Each epoch is
    judged with all bits in place, which weights on their way do not stand well. With batches of a
    few examples, --freeze-norm 0.34 lets them learn with the statistics they are judged with.
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
        training__latent_rate=latent_rate,
        training__ramp=ramp,
        training__freeze_norm=freeze_norm,
        training__schedule=schedule,
        training__optimizer=optimizer,
        training__threads=threads,
    )
    epochs_done: list[Epoch] = []
    console = Console(stderr=True, highlight=False)
    with ExitStack() as stack:
        team = stack.enter_context(_team(distributed, exchange, exchange_bits, seed, device))
        silent = team is not None and team.rank > 0
        console.quiet = silent
        train_set = load_subset(data, root, config.data.train_subset, boxes, console)
        test_set = load_subset(data, root, config.data.test_subset, boxes, console)
        if not has_tensorboard():
            console.print("no TensorBoard logs: pip install tensorboard gives them", markup=False)
        progress = stack.enter_context(progress_bar(console))
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

        begin = time.monotonic()
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
        more = "train anew for more" if has_fixed_length(config) else "raise --epochs"
        raise UserError(f"{out}: all of {epochs} epochs are done already; {more}")
    last = epochs_done[-1].evaluation
    if as_json:
        result = {
            "epochs": epochs,
            "loss": epochs_done[-1].result.loss,
            last.metric_name: last.percent,
            f"best_{last.metric_name}": epochs_done[-1].best_percent,
            "out": str(out),
        }
        print(json_text(result))
    else:
        print(f"{out / BEST}: the best checkpoint, by {last.metric_name} on '{test_set.subset}'")


def _team(
    distributed: bool, exchange: str, exchange_bits: float, seed: int, device: str
) -> AbstractContextManager[Team | None]:
    """The team of this process, or none. Raises UserError where options contradict each other."""
    if not distributed:
        if (exchange, exchange_bits) != ("float32", 32):
            raise UserError(
                f"--exchange {exchange} --exchange-bits {exchange_bits:g}: expected --distributed "
                "beside it"
            )
        return nullcontext()
    if device != "cpu":
        raise UserError(f"--device {device}: torchrun's processes find their devices themselves")
    update = UpdateConfig(
        codec=exchange, bits=exchange_bits, error_feedback="off" if exchange == "float32" else "on"
    )
    return team_of_torchrun(update, seed)


def _best_text(epochs: list[Epoch]) -> str:
    """The best figure so far, once there is one."""
    if not epochs:
        return ""
    return f"  best {epochs[-1].evaluation.metric_name} {epochs[-1].best_percent:.2f}"


def _epoch_line(epoch: Epoch, num_epochs: int, seconds_left: float) -> str:
    left = f"  {timedelta(seconds=round(seconds_left))} left" if epoch.epoch < num_epochs else ""
    rate = epoch.result.num_examples / epoch.result.seconds
    ramp = f"  weights {epoch.weight_share:.0%} on their way" if epoch.weight_share < 1 else ""
    return (
        f"epoch {epoch.epoch}/{num_epochs}  loss {epoch.result.loss:.5f}  "
        f"{epoch.evaluation.metric_name} {epoch.evaluation.percent:.2f}"
        f"{' (best)' if epoch.is_best else ''}  rate {epoch.learning_rate:.2g}  "
        f"{rate:.0f} images/s{ramp}{left}"
    )
