"""How a schedule of learning rates is written."""

from fedcunet.errors import UserError

NAMED = ("paper", "constant", "cosine")


def parse_schedule(schedule: str) -> tuple[tuple[float, float], ...]:
    """The factors that apply from an epoch on, as (epoch, factor); none of a named schedule.

    Raises:
        UserError: if the schedule cannot be read.
    """
    if schedule in NAMED:
        return ()
    try:
        pairs = [part.split(":") for part in schedule.split(",")]
        steps = tuple((float(start), float(factor)) for start, factor in pairs)
    except ValueError:
        steps = ()
    if not steps or not all(start >= 0 and 0 < factor <= 1e6 for start, factor in steps):
        raise UserError(
            f"training.schedule: expected {', '.join(NAMED)} or epoch:factor pairs such as "
            f"30:0.2,60:0.5, found '{schedule}'"
        )
    return steps
