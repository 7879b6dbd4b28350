"""A training's curves for TensorBoard.

Every value stands at the number of training steps done, so that a training that is resumed from its
last epoch can take back what was logged after it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def has_tensorboard() -> bool:
    """Whether the package is there; it comes with the extra `federated`."""
    return find_spec("tensorboard") is not None


class TrainingLog:
    """Writes scalars, or nothing where there is no TensorBoard."""

    def __init__(self, writer: "SummaryWriter | None") -> None:
        self._writer = writer

    def add(self, step: int, values: dict[str, float]) -> None:
        """Adds values by name at `step`, the training steps done so far."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Puts everything onto disk."""
        if self._writer is not None:
            self._writer.flush()


@contextmanager
def open_training_log(folder: Path, *, steps_done: int) -> Iterator[TrainingLog]:
    """The log in `folder`, closed at the end.

    Args:
        folder: made if it is not there.
        steps_done: steps of the epochs that are over; what the folder holds of later ones, from a
            training that broke off, is shown no more.
    """
    if not has_tensorboard():
        yield TrainingLog(None)
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=steps_done + 1)
    try:
        yield TrainingLog(writer)
    finally:
        writer.close()
