"""The training loop that central training and federated clients share.

B batch, K landmarks, S heatmap side.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedcunet.config import DataConfig, TrainingConfig
from fedcunet.data.annotations import AnnotationSet, LandmarkScheme
from fedcunet.data.augmentation import Augmentation
from fedcunet.data.crops import CropBatch, Crops, CropSubset
from fedcunet.data.disk_cache import DiskCache
from fedcunet.data.prefetch import prefetched
from fedcunet.errors import RunFailure
from fedcunet.quant.layers import (
    clamp_latent_weights,
    quantised_weights,
    seed_rounding,
    weights_on_their_way,
)
from fedcunet.quant.storage import Stored
from fedcunet.training.compact import CompactOptimizer
from fedcunet.training.losses import make_targets, supervised_loss, supervisions_of

STRIDE = 4  # crop pixels of a heatmap pixel

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    # The paper's: decay 0.99, eps 1e-8, no momentum, no weight decay.
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, alpha=0.99, eps=1e-8),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    # Squared gradients of heatmaps fall eightyfold from the first epoch to the third; torch's 0.999
    # remembers them for a thousand, in which steps are too small (docs/networks.md).
    "adam": lambda groups: torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True),
}
_FACTOR = "factor"  # of a group: its learning rate over that of the setting


def make_optimizer(
    model: nn.Module, training: TrainingConfig, learning_rate: float, *, weight_share: float = 1.0
) -> torch.optim.Optimizer:
    """The setting's optimiser over all parameters, in the form that the network's storage has.

    Latent weights are a group of their own, at `latent_rate` times the rate of the others.
    BinaryConnect has rates of their own for them too (Courbariaux et al., NeurIPS 2015, section
    2.5).

    Args:
        model: the network.
        training: names the optimiser.
        learning_rate: see `set_learning_rate`.
        weight_share: see `set_learning_rate`.
    """
    factors = dict.fromkeys(quantised_weights(model), training.latent_rate)
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault(factors.get(parameter, 1.0), []).append(parameter)
    given = [{"params": members, _FACTOR: factor} for factor, members in groups.items()]
    optimizer: torch.optim.Optimizer
    if isinstance(model, Stored) and model.frugal:
        optimizer = CompactOptimizer(model, given, training.optimizer)
    else:
        optimizer = OPTIMIZERS[training.optimizer](given)
    set_learning_rate(optimizer, learning_rate, weight_share=weight_share)
    return optimizer


def set_learning_rate(
    optimizer: torch.optim.Optimizer, learning_rate: float, *, weight_share: float = 1.0
) -> None:
    """The rate of an optimiser of `make_optimizer` from here on.

    Args:
        optimizer: its groups of parameters have factors.
        learning_rate: where the factor is 1.
        weight_share: how far latent weights are on the way to their bits; floats learn as others
            do.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * (1 + weight_share * (group[_FACTOR] - 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalResult:
    """What a pass of training did."""

    num_examples: int  # crops that were trained on, repeats counted
    num_steps: int
    loss: float  # mean over the steps
    seconds: float  # wall time of loading and steps


def crops_of(data: DataConfig, found: AnnotationSet) -> Crops:
    """The crops of a setting, with its caches."""
    disk = None
    if data.disk_cache_bytes:
        disk = DiskCache(Path(data.cache_dir), data.disk_cache_bytes)
    return Crops(
        found.annotations,
        found.scheme,
        size=data.size,
        budget_bytes=data.cache_bytes,
        disk=disk,
    )


def augmentation_of(data: DataConfig, scheme: LandmarkScheme) -> Augmentation:
    """The augmentation of a setting for landmarks of `scheme`."""
    return Augmentation(
        scale=(1 - data.scale, 1 + data.scale),
        rotation_degrees=data.rotation,
        flip=data.flip == "always" or (data.flip == "paper" and not scheme.is_face),
        colour=data.colour,
    )


def batches(order: Sequence[int], batch_size: int) -> list[list[int]]:
    """Cuts `order` into batches; in a last batch of one the one before it has its last example too.

    BatchNorm needs two values a channel, and the neck of a 64-pixel crop is one pixel wide; a
    single example is taken twice (its augmentations differ). Of batches of two the last has three,
    no other is larger than `batch_size`; batches of one, which larger crops may have, stay.
    """
    cut = [list(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    if batch_size == 1 or not cut or len(cut[-1]) > 1:
        return cut
    if len(cut) == 1:
        cut[-1] *= 2
    elif batch_size == 2:
        single = cut.pop()
        cut[-1] += single
    else:
        cut[-1].insert(0, cut[-2].pop())
    return cut


def freeze_norms(model: nn.Module) -> None:
    """Puts every BatchNorm of `model` into evaluation mode, until `model.train()` is called."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def train_pass(
    model: nn.Module,
    crops: Crops | CropSubset,
    optimizer: torch.optim.Optimizer,
    *,
    batch_size: int,
    num_epochs: float,
    sigma: float,
    augmentation: Augmentation | None,
    seed: Sequence[int],
    weight_share: float = 1.0,
    freeze_norm: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
) -> LocalResult:
    """Trains `model` in place for `num_epochs` passes over `crops`.

    Everything random (order, augmentation, rounding) follows from `seed` alone.

    Args:
        model: network whose output is a list of heatmaps, on its device.
        crops: the examples.
        optimizer: over the model's parameters; its learning rate is used as it stands.
        batch_size: examples of a step.
        num_epochs: may be a fraction; at least one step is made.
        sigma: of the target Gaussians in heatmap pixels; it sets the discs' radius too.
        augmentation: None for the plain crops.
        seed: integers that identify this pass, such as (seed, round, client).
        weight_share: how far weights at 1 or 2 bits are on the way there; after the pass they are
            there.
        freeze_norm: BatchNorm normalises with its running statistics, which stay as they are. What
            it learns then is what is used later, however small the batches (Wu and Johnson,
            "Rethinking Batch in BatchNorm", 2021, arXiv 2105.07576, section 4).
        progress: called after each step with steps done, steps in all, and the step's loss.

    Raises:
        RunFailure: if a loss, or at the end a weight, is not finite.
    """
    begin = time.perf_counter()
    generator = np.random.default_rng(list(seed))
    seed_rounding(model, int(generator.integers(2**63)))
    device = next(model.parameters()).device
    latent = quantised_weights(model)
    supervisions = supervisions_of(model)
    wanted = max(1, round(num_epochs * len(crops)))
    order: list[int] = []
    while len(order) < wanted:
        order += generator.permutation(len(crops)).tolist()
    plan = batches(order[:wanted], batch_size)
    model.train()
    optimizer.zero_grad(set_to_none=True)
    if freeze_norm:
        freeze_norms(model)
    losses = []

    def make(indices: list[int]) -> CropBatch:
        return crops.batch(indices, augmentation=augmentation, generator=generator)

    with weights_on_their_way(model, weight_share):
        for step, batch in enumerate(prefetched(make, plan), start=1):
            images_B3HW = batch.images_B3HW.to(device, memory_format=torch.channels_last)
            labelled_BK = batch.labelled_BK.to(device)
            targets = make_targets(
                supervisions,
                batch.points_BK2.to(device),
                labelled_BK,
                side=images_B3HW.shape[-1] // STRIDE,
                stride=STRIDE,
                sigma=sigma,
            )
            loss = supervised_loss(model(images_B3HW), supervisions, targets, labelled_BK)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # they are not kept beside the next maps
            clamp_latent_weights(latent)
            losses.append(float(loss.detach()))
            if not np.isfinite(losses[-1]):
                raise RunFailure(f"training step {step}: the loss is {losses[-1]}; lower the rate")
            if progress is not None:
                progress(step, len(plan), losses[-1])
    # A loss is of the weights before its step: what the last step made of them is not in any.
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise RunFailure(f"training step {len(plan)}: weights are not finite; lower the rate")
    return LocalResult(
        num_examples=sum(map(len, plan)),
        num_steps=len(plan),
        loss=float(np.mean(losses)),
        seconds=time.perf_counter() - begin,
    )
