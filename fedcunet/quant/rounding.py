"""Random numbers for stochastic rounding: explicit, seeded, and cheap."""

import torch
from torch import Tensor

from fedcunet.quant.workspace import Workspace

_LANES = 2**15  # xorshift generators side by side


class Rounding:
    """The random numbers of stochastic rounding, shared by all of one network."""

    def __init__(self) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}
        self._lanes: dict[torch.device, Tensor] = {}
        self._seed = 0

    def seed(self, seed: int) -> None:
        """Starts every device's numbers anew from `seed`, an integer of at most 63 bits."""
        self._seed = seed
        self._generators.clear()
        self._lanes.clear()

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of the device, made at its first use."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    def held(self) -> list[Tensor]:
        """What stays from step to step: some 130 kB of each device that has rounded."""
        return list(self._lanes.values())

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

    def scale_and_round_(self, values: Tensor, factor: Tensor, workspace: Workspace) -> Tensor:
        """Rounds `values` * `factor` in place to a whole number at either side, without bias.

        floor(x + u) with u = (i + 0.5) / 256 and a random byte i: unbiased to 1/512.

        Args:
            values: contiguous; channels last.
            factor: broadcasts to them.
            workspace: of the step.
        """
        count = values.numel()
        words = workspace.take("random words", -(-count // 4), dtype=torch.int32)
        self.fill(words)
        noise = workspace.take("scratch", *values.shape)
        noise.copy_(words.view(torch.uint8)[:count].view(values.shape))
        half_C = values.new_full(values.shape[-1:], 0.5 / 256)
        torch.addcmul(half_C, values, factor, out=values)
        return values.add_(noise, alpha=1 / 256).floor_()
