"""What a payload must be: the client packs by it, the server admits by it."""

import functools
from dataclasses import dataclass

from fedcunet.codecs import check_codec_bits, get_codec, make_seed
from fedcunet.codecs.base import LEAST_BUDGET, MOST_BUDGET
from fedcunet.errors import UserError
from fedcunet.layout import Layout

HEADER_BYTES, CHECKSUM_BYTES = 52, 8
OVERHEAD_BYTES = HEADER_BYTES + CHECKSUM_BYTES


def fine_codec(codec: str, bits: float, fine_bits: float) -> tuple[str, float]:
    """Codec and bits of the fine tensors: float32 beside float32, else by the bits.

    Fine bits of 0 leave the choice here: linear at 8 bits; beside a codec with a budget four times
    its bits, from 1 to 8, shared out evenly (`trellis-even`), since the fine tensors, a few percent
    of all, have units of their own.

    Raises:
        UserError: `fine_bits` is none of 0, 2 to 16 (linear; 16: float16) and 32.
    """
    if codec == "float32" or fine_bits == 32:
        return "float32", 32
    if fine_bits == 0:
        if get_codec(codec).budget:
            return "trellis-even", min(max(4 * bits, 1), 8)
        return "linear", 8
    name = "float16" if fine_bits == 16 else "linear"
    if not 2 <= fine_bits <= 16:
        raise UserError(
            f"fine bits must be 0 or a whole number from 2 to 16, or 32, not {fine_bits}"
        )
    return name, check_codec_bits(get_codec(name), fine_bits)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a payload must be: the client packs by it, the server admits by it.

    Attributes:
        layout: Of the update.
        run_seed: The run's seed, in [0, 2^64).
        round: In [0, 2^32).
        sender: The stable client id, in [0, 2^64).
        codec: Name in CODECS.
        bits: Per value, in the codec's range.
        fine_bits: For the fine tensors: 2 to 15 (linear), 16 (float16), 32, or 0 to leave it to
            `fine_codec`. Without effect when the codec is float32: these are float32 then too.
    """

    layout: Layout
    run_seed: int
    round: int
    sender: int
    codec: str
    bits: float
    fine_bits: float = 0

    def __post_init__(self) -> None:
        for what, value, limit in (
            ("seed", self.run_seed, 64),
            ("round", self.round, 32),
            ("sender", self.sender, 64),
        ):
            if not 0 <= value < 2**limit:
                raise UserError(f"{what} must be in [0, 2^{limit}), not {value}")
        check_codec_bits(get_codec(self.codec), self.bits)
        fine_codec(self.codec, self.bits, self.fine_bits)

    @functools.cached_property
    def fine_codec(self) -> tuple[str, float]:
        """Codec and bits of the fine tensors."""
        return fine_codec(self.codec, self.bits, self.fine_bits)

    @functools.cached_property
    def fine_limits(self) -> tuple[int, int]:
        """The least and the greatest number of bytes of the fine body; an empty part has none."""
        return self._limits(*self.fine_codec, fine=True)

    def main_bits(self, fine_bytes: int) -> float:
        """Bits of the main body's codec: `bits`, or what a budget leaves beside the fine body."""
        codec = get_codec(self.codec)
        if not codec.budget:
            return self.bits
        rest = self.bits * self.layout.num_parameters - 8 * (OVERHEAD_BYTES + fine_bytes)
        share = rest / max(sum(self.layout.segments(fine=False)), 1)
        return min(max(share, LEAST_BUDGET), MOST_BUDGET)

    def main_limits(self, fine_bytes: int) -> tuple[int, int]:
        """As `fine_limits` for the main body beside a fine body of `fine_bytes`."""
        return self._limits(self.codec, self.main_bits(fine_bytes), fine=False)

    def _limits(self, name: str, bits: float, *, fine: bool) -> tuple[int, int]:
        segments = self.layout.segments(fine=fine)
        if not segments:
            return 0, 0
        return get_codec(name).body_limits(length=sum(segments), bits=bits, segments=segments)

    @property
    def payload_limits(self) -> tuple[int, int]:
        """The least and the greatest length of a payload: header, bodies and checksum.

        They are equal unless the codec has a budget.
        """
        least, most = self.fine_limits
        low, high = self.main_limits(most)[0] + least, self.main_limits(least)[1] + most
        return OVERHEAD_BYTES + low, OVERHEAD_BYTES + high

    def seed(self, purpose: str) -> bytes:
        """The seed of one of the two bodies."""
        return make_seed(self.run_seed, self.round, self.sender, purpose)
