"""Random numbers for stochastic rounding: explicit, seeded, and cheap."""

import random
from collections.abc import Iterator

import torch
from torch import Tensor

_LANES = 2**15  # xorshift generators side by side
_POOL = 2**17  # uniform numbers that are drawn at once
_PIECE = _POOL // 2  # values that are rounded with a run of them
_USES = 64  # pieces before they are drawn anew


class _Pool:
    """Numbers (i + 0.5) / 256 with random bytes i, for many pieces of values.

    A piece takes a run of them from a random place on: a value meets another number in every
    step, and a number is drawn once for some 32 values.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self.uses_left = 0


class Rounding:
    """The random numbers of stochastic rounding, shared by all of one network."""

    def __init__(self) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}
        self._lanes: dict[torch.device, Tensor] = {}
        self._pools: dict[tuple[torch.device, torch.dtype], _Pool] = {}
        self._places = random.Random(0)
        self._seed = 0

    def seed(self, seed: int) -> None:
        """Starts every device's numbers anew from `seed`, an integer of at most 63 bits."""
        self._seed = seed
        self._generators.clear()
        self._lanes.clear()
        self._pools.clear()
        self._places.seed(seed)

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of the device, made at its first use."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    def held(self) -> list[Tensor]:
        """What stays from step to step: some 660 kB of each device that has rounded."""
        return [*self._lanes.values(), *(pool.numbers for pool in self._pools.values())]

    def fill(self, words: Tensor) -> None:
        """Fills `words` (int32, 1-D) with random bits.

        Marsaglia's xorshift ("Xorshift RNGs", 2003) in lanes whose seeds come from the generator:
        a tenth of the generator's own time.
        """
        lanes = self._lanes.get(words.device)
        if lanes is None:
            lanes = torch.empty(_LANES, dtype=torch.int32, device=words.device)
            lanes.random_(1, None, generator=self.generator(words.device))
            self._lanes[words.device] = lanes
        shifted = torch.empty_like(lanes)
        for start in range(0, len(words), _LANES):
            piece = words[start : start + _LANES]
            lanes.bitwise_xor_(torch.bitwise_left_shift(lanes, 13, out=shifted))
            # The shift of a signed number copies its sign; the mask takes that away.
            torch.bitwise_right_shift(lanes, 17, out=shifted).bitwise_and_(0x7FFF)
            lanes.bitwise_xor_(shifted)
            lanes.bitwise_xor_(torch.bitwise_left_shift(lanes, 5, out=shifted))
            piece.copy_(lanes[: len(piece)])

    def scale_and_round_(self, values: Tensor, factor: Tensor) -> Tensor:
        """Rounds `values` * `factor` in place to a whole number at either side, without bias.

        floor(x + u) with u = (i + 0.5) / 256 and a random byte i: unbiased to 1/512.

        Args:
            values: contiguous.
            factor: broadcasts to them.
        """
        for part, own in _pieces(values, factor):
            torch.addcmul(self._uniform(part), part, own, out=part).floor_()
        return values

    def _uniform(self, like: Tensor) -> Tensor:
        """Numbers for a piece, shaped as it is."""
        pool = self._pools.get((like.device, like.dtype))
        if pool is None:
            pool = self._pools[like.device, like.dtype] = _Pool(like.new_empty(_POOL))
        if not pool.uses_left:
            words = torch.empty(_POOL // 4, dtype=torch.int32, device=like.device)
            self.fill(words)
            pool.numbers.copy_(words.view(torch.uint8)).add_(0.5).mul_(1 / 256)
            pool.uses_left = _USES
        pool.uses_left -= 1
        place = self._places.randrange(_POOL - _PIECE + 1)
        return pool.numbers[place : place + like.numel()].view(like.shape)


def _pieces(values: Tensor, factor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """`values` in parts of at most `_PIECE`, with the factors of each."""
    if values.numel() <= _PIECE:
        yield values, factor
        return
    dim, size = next(each for each in enumerate(values.shape) if each[1] > 1)
    for start, stop in ((0, size // 2), (size // 2, size)):
        has_own = factor.dim() > 0 and factor.shape[dim] > 1
        own = factor.narrow(dim, start, stop - start) if has_own else factor
        yield from _pieces(values.narrow(dim, start, stop - start), own)
