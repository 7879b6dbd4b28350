"""An adaptive binary range coder for the few numbers beside a vector: classes, shapes, factors.

The carry-less form of Martin's range coder ("Range encoding: an algorithm for removing redundancy
from a digitised message", 1979) with adaptive bits, as in LZMA (Pavlov, LZMA specification, 2015).
Whole numbers only. It codes some thousand bits a millisecond in plain Python.
"""

_PROBABILITY_BITS = 12
_RATE = 4  # a probability moves by 1/16 of its error
_TOP = 1 << 24
_MASK = (1 << 32) - 1


class BitModels:
    """Adaptive probabilities of a zero, by name; each begins at one half."""

    def __init__(self) -> None:
        self._probability: dict[object, int] = {}

    def probability(self, context: object) -> int:
        """Of a zero, in 1/4096, from 31 to 4065."""
        return self._probability.get(context, 1 << (_PROBABILITY_BITS - 1))

    def update(self, context: object, bit: int) -> None:
        """Moves the probability towards the bit that came."""
        old = self.probability(context)
        target = 31 if bit else (1 << _PROBABILITY_BITS) - 31
        self._probability[context] = old + ((target - old) >> _RATE)


class RangeEncoder:
    """Collects numbers; `finish` gives their bytes."""

    def __init__(self) -> None:
        self._low, self._range = 0, _MASK
        self._bytes = bytearray()
        self._models = BitModels()

    def number(self, value: int, num_bits: int, context: object) -> None:
        """Appends `value` in [0, 2^num_bits), the highest bit first, each with its own model."""
        node = 1
        for place in range(num_bits - 1, -1, -1):
            bit = (value >> place) & 1
            self._bit(bit, (context, node))
            node = 2 * node + bit

    def _bit(self, bit: int, context: object) -> None:
        bound = (self._range >> _PROBABILITY_BITS) * self._models.probability(context)
        if bit:
            self._low += bound
            self._range -= bound
        else:
            self._range = bound
        self._models.update(context, bit)
        if self._low > _MASK:
            self._low &= _MASK
            self._carry()
        while self._range < _TOP:
            self._bytes.append(self._low >> 24)
            self._low = (self._low << 8) & _MASK
            self._range = (self._range << 8) & _MASK

    def _carry(self) -> None:
        place = len(self._bytes) - 1
        while self._bytes[place] == 0xFF:
            self._bytes[place] = 0
            place -= 1
        self._bytes[place] += 1

    def finish(self) -> bytes:
        """The bytes; zeros at the end are left away, for the decoder reads on in zeros."""
        # Of all numbers in the interval the one with most zeros at its end.
        for keep in range(8, 33, 8):
            mask = (1 << (32 - keep)) - 1
            value = (self._low + mask) & ~mask
            if value < self._low + self._range:
                break
        if value > _MASK:
            value &= _MASK
            self._carry()
        return bytes(self._bytes + value.to_bytes(4, "big")).rstrip(b"\0")


class RangeDecoder:
    """Reads back what a `RangeEncoder` collected; any bytes decode to some numbers."""

    def __init__(self, content: bytes) -> None:
        self._content, self._position = content, 4
        self._code = int.from_bytes(content[:4].ljust(4, b"\0"), "big")
        self._range = _MASK
        self._models = BitModels()

    def number(self, num_bits: int, context: object) -> int:
        """The next number in [0, 2^num_bits)."""
        node = 1
        for _ in range(num_bits):
            node = 2 * node + self._bit((context, node))
        return node - (1 << num_bits)

    def _bit(self, context: object) -> int:
        bound = (self._range >> _PROBABILITY_BITS) * self._models.probability(context)
        bit = int(self._code >= bound)
        if bit:
            self._code -= bound
            self._range -= bound
        else:
            self._range = bound
        self._models.update(context, bit)
        while self._range < _TOP:
            following = self._content[self._position : self._position + 1]
            self._code = ((self._code << 8) | (following[0] if following else 0)) & _MASK
            self._range = (self._range << 8) & _MASK
            self._position += 1
        return bit
