"""Work space of a training step: buffers that are taken again and again, never given back."""

import math

from torch import Tensor


class Workspace:
    """Buffers by name; each is as large as the largest that was asked for under its name.

    Allocating a map costs more than reading it, for the system clears its pages.

    Args:
        like: a tensor with the dtype and the device of the buffers.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A contiguous tensor with any content; it holds until the name is asked for again."""
        view = self._views.get((name, shape))
        if view is None:
            view = self._view(name, shape)
            self._views[name, shape] = view
        return view

    def _view(self, name: str, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count:
            # The former one goes before the new one comes.
            self._views = {key: view for key, view in self._views.items() if key[0] != name}
            buffer = self._buffers.pop(name, None)
            del buffer
            buffer = self.like.new_empty(count)
            self._buffers[name] = buffer
        return buffer[:count].view(shape)
