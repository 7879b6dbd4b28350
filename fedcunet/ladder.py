"""Which rung of `federation.ladder` a device takes: the first whose measured need fits into it."""

from dataclasses import dataclass

from fedcunet.config import RunConfig
from fedcunet.errors import UserError
from fedcunet.measured import NotMeasured, step_need


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where on the ladder a device trains.

    Attributes:
        rung: 0 for the setting itself, 1 for the ladder's first.
        needed_bytes: what a training process on this rung was seen to take.
        growth_bytes: of these, what it took beyond a process that had not begun.
    """

    rung: int
    needed_bytes: int
    growth_bytes: int


class TooSmall(UserError):
    """A device that can hold no rung."""


def climb(
    config: RunConfig,
    num_landmarks: int,
    allowed_bytes: int,
    *,
    beside_bytes: int = 0,
    who: str = "client",
) -> Place:
    """The first rung whose training process fits; what comes after it is not measured.

    Args:
        config: the setting with its ladder, which may be empty.
        num_landmarks: K of the heatmaps.
        allowed_bytes: what training may take.
        beside_bytes: what the process holds beside what was measured, such as images.
        who: what is too small, for messages.

    Raises:
        TooSmall: no rung fits; the line says what the least would need.
    """
    rungs, least, unmeasured = config.rungs(), None, ""
    for number, setting in enumerate(rungs):
        try:
            need = step_need(setting, num_landmarks)
        except NotMeasured as failure:  # it does not even fit here
            unmeasured = str(failure)
            continue
        needed = need.resident_bytes + beside_bytes
        if needed <= allowed_bytes:
            return Place(rung=number, needed_bytes=needed, growth_bytes=need.growth_bytes)
        least = needed if least is None else min(least, needed)
    if least is None:
        raise TooSmall(unmeasured)
    thriftiest = "" if len(rungs) == 1 else " on the thriftiest rung of federation.ladder"
    included = ", images included" if beside_bytes else ""
    raise TooSmall(
        f"training needs {least / 1e6:.0f} MB of memory{thriftiest} (measured{included}), "
        f"this {who} has {allowed_bytes / 1e6:.0f} MB for it"
    )
