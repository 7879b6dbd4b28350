"""Which rung of `federation.ladder` a device takes: the first whose measured need fits into it."""

from collections.abc import Callable
from dataclasses import dataclass

from fedcunet.config import RunConfig
from fedcunet.errors import UserError
from fedcunet.measured import NotMeasured, StepNeed, step_need


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where on the ladder a device trains.

    Attributes:
        rung: 0 for the setting itself, 1 for the ladder's first.
        needed_bytes: what training on this rung was seen to take, as `climb` was told to count it.
        growth_bytes: what a fresh process grew by.
    """

    rung: int
    needed_bytes: int
    growth_bytes: int


class TooSmall(UserError):
    """A device that can hold no rung."""


def training_peak(need: StepNeed) -> int:
    """What a virtual device must hold: the peak of the training step itself.

    The same each time it is measured, so that the same setting finds the same rungs. The process
    around it, here Python with its libraries, is not the one that a device would run, and its
    high-water mark differs from one measurement to the next by more than some rungs do.
    """
    return need.peak_bytes


def climb(
    config: RunConfig,
    num_landmarks: int,
    allowed_bytes: int,
    *,
    who: str,
    needed: Callable[[StepNeed], int] = training_peak,
    counted: str = "measured",
    is_here: bool = False,
) -> Place:
    """The first rung that fits; what comes after it is not measured.

    Args:
        config: the setting with its ladder, which may be empty.
        num_landmarks: K of the heatmaps.
        allowed_bytes: what training may take.
        who: what may be too small, for messages.
        needed: the bytes of a measurement that must fit.
        counted: what these are, for messages.
        is_here: the device is this machine: what cannot be measured here does not fit.

    Raises:
        TooSmall: no rung fits; the line says what the least would need.
        NotMeasured: a rung cannot be measured here, though the device may hold it.
    """
    rungs, unmeasured = config.rungs(), ""
    least: int | None = None
    for number, setting in enumerate(rungs):
        try:
            need = step_need(setting, num_landmarks)
        except NotMeasured as failure:
            if not is_here:
                raise NotMeasured(
                    f"federation.ladder, rung {number} for {who}: {failure}"
                ) from None
            unmeasured = str(failure)
            continue
        found = needed(need)
        if found <= allowed_bytes:
            return Place(rung=number, needed_bytes=found, growth_bytes=need.growth_bytes)
        least = found if least is None else min(least, found)
    if least is None:
        raise TooSmall(unmeasured)
    thriftiest = "" if len(rungs) == 1 else " on the thriftiest rung of federation.ladder"
    raise TooSmall(
        f"training needs {least / 1e6:.0f} MB of memory ({counted}){thriftiest}, "
        f"{who} has {allowed_bytes / 1e6:.0f} MB for it"
    )
