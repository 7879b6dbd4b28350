"""Maps in pieces: chunks of samples, strips of rows, and inputs read piece by piece.

Shapes: n samples and h rows of a chunk, C channels, H W the sides of a map. Channels come last.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedcunet.quant.collector import Collector
from fedcunet.quant.kernels import FULL
from fedcunet.quant.rounding import Rounding
from fedcunet.quant.sources import Source
from fedcunet.quant.waiting import CodedGradient, FloatGradient, WaitingGradient
from fedcunet.quant.workspace import Workspace

# The most values in one buffer of a stage, where a chunk can be that small: three such buffers
# stay within a core's cache.
CHUNK_VALUES = 2**17


def chunks(batch: int, channels: int, height: int, width: int) -> Iterator[tuple[slice, int]]:
    """Samples to take together, and the rows of a strip: the height, or an even part of it."""
    samples = max(1, min(batch, CHUNK_VALUES // (channels * height * width)))
    rows = height
    while samples == 1 and channels * rows * width > CHUNK_VALUES and rows % 4 == 0:
        rows //= 2
    for start in range(0, batch, samples):
        yield slice(start, min(start + samples, batch)), rows


def strips(height: int, rows: int) -> list[slice]:
    """The rows 0 to `height` in strips of `rows`."""
    return [slice(start, start + rows) for start in range(0, height, rows)]


def lower(gradient_nHWC: Tensor) -> Tensor:
    """The sums of squares of four pixels: the backward pass of `kernels.raise_into`."""
    rows_nhWC = gradient_nHWC[:, 0::2] + gradient_nHWC[:, 1::2]
    return rows_nhWC[:, :, 0::2] + rows_nhWC[:, :, 1::2]


@dataclass(frozen=True, slots=True)
class Strip:
    """Rows of a convolution's output, and the rows of its input that they are made from.

    Args:
        rows: of the output.
        height: of the whole map.
        reach: rows that the convolution reads above and below: 0, or 1 for 3x3.
    """

    rows: slice
    height: int
    reach: int

    @property
    def read(self) -> slice:
        """The input's rows; beyond the map's edges there are rows of zeros."""
        start, stop = self.rows.start - self.reach, self.rows.stop + self.reach
        return slice(max(0, start), min(self.height, stop))

    @property
    def above(self) -> int:
        """Rows of zeros above."""
        first: int = self.rows.start
        return max(0, self.reach - first)

    @property
    def overlap(self) -> int:
        """How many of the rows it reads the strip before has read too."""
        return 2 * self.reach if self.rows.start > 0 else 0


@dataclass(frozen=True, slots=True)
class Input:
    """A source as a stage reads it: as it is, or raised to twice the height and width."""

    source: Source
    raised: bool = False

    @property
    def scale(self) -> int:
        return 2 if self.raised else 1

    def rows(self, rows: slice) -> slice:
        """The source's rows under `rows` of the stage."""
        return slice(rows.start // self.scale, rows.stop // self.scale)

    def load(self, samples: slice, rows: slice, place_nhWC: Tensor, workspace: Workspace) -> Tensor:
        """Puts the codes under some rows of the stage into `place_nhWC`."""
        return self.source.load(samples, self.rows(rows), place_nhWC, workspace, raised=self.raised)


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What the stages of one step share."""

    workspace: Workspace
    rounding: Rounding
    collector: Collector
    gradient_bits: int  # of gradients that wait; 32: they wait as they are
    packed: bool

    def open_gradients(self, inputs: Sequence[Input]) -> list[bool]:
        """Makes room for the gradients of inputs; whether each is the first of its source."""
        are_first = []
        for each in inputs:
            are_first.append(each.source.waiting is None)
            if each.source.waiting is None:
                each.source.waiting = self._room(each.source.shape)
        return are_first

    def _room(self, shape: tuple[int, int, int, int]) -> WaitingGradient:
        like = self.workspace.like
        if self.gradient_bits == FULL:
            return FloatGradient(shape, like)
        return CodedGradient(
            shape, like, bits=self.gradient_bits, packed=self.packed, rounding=self.rounding
        )

    def add_gradient(
        self, view: Input, samples: slice, rows: slice, gradient_nhWC: Tensor, *, first: bool
    ) -> None:
        """Adds the gradient of some rows of a stage's input to what waits for its source."""
        waiting = view.source.waiting
        assert waiting is not None
        if view.raised:
            gradient_nhWC = lower(gradient_nhWC)
        waiting.add(samples, view.rows(rows), gradient_nhWC, self.workspace, first=first)
