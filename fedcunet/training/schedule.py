"""Learning rates over a training, weights on the way to their bits, BatchNorm that is frozen.

The named schedules are the paper's (Tang et al., ECCV 2018, section 4, "Training"): for faces the
rate is divided by 5, 2 and 2 at epochs 30, 60 and 90, for poses by 5 at epoch 100.
"""

import math

from fedcunet.config import RunConfig
from fedcunet.config.schedule import parse_schedule

FACE = ((30.0, 1 / 5), (60.0, 1 / 2), (90.0, 1 / 2))
POSE = ((100.0, 1 / 5),)


def rate_factor(schedule: str, *, epoch: float, num_epochs: float, is_face: bool) -> float:
    """What the first learning rate is multiplied by at `epoch` (0-based, may be a fraction).

    Args:
        schedule: `paper`, `constant`, `cosine`, or factors that apply from an epoch on, such as
            "30:0.2,60:0.5"; factors multiply.
        epoch: passes over the data done so far.
        num_epochs: passes of the whole training, for `cosine`, which ends at 1 % of the rate.
        is_face: which of the paper's schedules `paper` is.

    Raises:
        UserError: if the schedule cannot be read.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        progress = min(max(epoch / num_epochs, 0.0), 1.0)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2
    paper = FACE if is_face else POSE
    steps = paper if schedule == "paper" else parse_schedule(schedule)
    return math.prod(factor for start, factor in steps if epoch >= start)


def weight_share(config: RunConfig, *, done: float, total: float) -> float:
    """How far a step's weights are on the way from floats, 0, to their 1 or 2 bits, 1.

    The way is linear, and takes `training.ramp` of the training; the last epoch or round always
    has all bits. 1 where there is no way to go.

    Args:
        config: the setting.
        done: epochs or rounds done so far.
        total: of the whole training.
    """
    length = min(round(config.training.ramp * total, 9), total - 1)
    if length <= 0 or not config.quant.has_latent_weights:
        return 1.0
    return min(done / length, 1.0)


def norm_is_frozen(config: RunConfig, *, done: float, total: float) -> bool:
    """Whether BatchNorm keeps its running statistics, and normalises with them.

    So it is over the last `training.freeze-norm` of the training; the first epoch or round always
    has the statistics of its batches.

    Args:
        config: the setting.
        done: epochs or rounds done so far.
        total: of the whole training.
    """
    return done > 0 and total - done <= round(config.training.freeze_norm * total, 9)


def has_fixed_length(config: RunConfig) -> bool:
    """Whether a training cannot be resumed with other epochs, for its course follows from them.

    A cosine's rate would leap up again, bits of a ramp would be lost, frozen statistics thaw.
    """
    training = config.training
    has_ramp = bool(training.ramp) and config.quant.has_latent_weights
    return has_ramp or bool(training.freeze_norm) or training.schedule == "cosine"
