"""The bytes of a trellis body: what stands in them, and the values that they stand for.

    head       25 bytes, little-endian, `_HEAD` below
    side       what is said of the tensors (allocation.py)
    words      of the entropy coder, 2 bytes each
    low        bits dropped before entropy coding, tensors of equal widths together
    escapes    numbers beyond the tables (escapes.py)

`TrellisCodec` (trellis.py) finds what to write; docs/codecs.md has the whole design.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedcunet.bits import pack_codes, packed_length, unpack_codes
from fedcunet.codecs.allocation import FORMS, Form, Tensors
from fedcunet.codecs.base import sum_of_squares
from fedcunet.codecs.densities import NUM_CLASSES
from fedcunet.codecs.dithered import MAX_LANES, Plan, Symbols, decode_values
from fedcunet.codecs.escapes import pack_escapes, unpack_escapes
from fedcunet.codecs.thinning import kept_values
from fedcunet.codecs.viterbi import NUM_STATES

# S, number of words, lanes, escaped numbers, bytes of what is said of the tensors, form and
# whether there is a reference, binary logarithm of the states, class of all tensors if `even`.
_HEAD = struct.Struct("<dIHIIBBB")
HEAD_BYTES = _HEAD.size
_MAX_PAIRS = 256  # of class and shape: bounds the table


def plan_of(
    tensors: Tensors, counts: np.ndarray, scale: float, form: Form, num_states: int
) -> Plan:
    """The plan of tensors of which `counts` values are coded."""
    coded = counts > 0
    steps = tensors.steps(scale, form, num_states)
    if np.unique(tensors.classes[coded] * 8 + tensors.shapes[coded]).size > _MAX_PAIRS:
        raise ValueError(f"more than {_MAX_PAIRS} pairs of class and shape")
    return Plan(
        lengths=counts[coded],
        steps=steps[coded],
        classes=tensors.classes[coded],
        shapes=tensors.shapes[coded],
        num_states=num_states,
    )


def body_bytes(
    *,
    scale: float,
    form: Form,
    num_states: int,
    num_lanes: int,
    has_reference: bool,
    even_class: int,
    side: bytes,
    words: np.ndarray,
    symbols: Symbols,
    plan: Plan,
) -> bytes:
    """A body of these parts.

    Args:
        scale: S, of the values as they came.
        form: how bits were shared out.
        num_states: of the trellis.
        num_lanes: of the coder.
        has_reference: whether the values were predicted.
        even_class: the class of all tensors if the form is `even`.
        side: what is said of the tensors.
        words: of the coder, uint16.
        symbols: for the dropped bits and the escapes.
        plan: of what was coded.
    """
    head = _HEAD.pack(
        scale,
        words.size,
        num_lanes,
        symbols.escaped.size,
        len(side),
        FORMS.index(form) + 4 * has_reference,
        num_states.bit_length() - 1,
        even_class,
    )
    low, escapes = _pack_low(symbols.low, plan), pack_escapes(symbols.escaped >> 1)
    return b"".join((head, side, words.astype("<u2").tobytes(), low, escapes))


def _low_groups(plan: Plan) -> Iterator[tuple[int, list[slice]]]:
    """Widths of dropped bits, ascending, and where the tensors of each stand in `Symbols.low`."""
    kept = np.flatnonzero(plan.dropped)
    widths, stops = plan.dropped[kept], np.cumsum(plan.lengths[kept])
    parts = [slice(stop - n, stop) for stop, n in zip(stops, plan.lengths[kept], strict=True)]
    for width in np.unique(widths).tolist():
        yield width, [part for part, own in zip(parts, widths, strict=True) if own == width]


def _pack_low(low: np.ndarray, plan: Plan) -> bytes:
    """Dropped bits, tensors of equal widths together, from the narrowest to the widest."""
    return b"".join(
        pack_codes(np.concatenate([low[part] for part in parts]), width).tobytes()
        for width, parts in _low_groups(plan)
    )


def _unpack_low(content: bytes, plan: Plan) -> tuple[np.ndarray, int]:
    """The dropped bits (uint16) in the order of the values, and the bytes they took.

    Raises:
        ValueError: `content` is too short.
    """
    low = np.empty(int(plan.lengths[plan.dropped > 0].sum()), dtype=np.uint16)
    position = 0
    for width, parts in _low_groups(plan):
        count = sum(part.stop - part.start for part in parts)
        stop = position + packed_length(count, width)
        packed = np.frombuffer(content[position:stop], dtype=np.uint8)
        codes = unpack_codes(packed, bits=width, count=count)
        for part in parts:
            size = part.stop - part.start
            low[part], codes = codes[:size], codes[size:]
        position = stop
    return low, position


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """What a body says before its words: of its own coding, and of the tensors."""

    form: Form
    scale: float
    num_states: int
    num_lanes: int
    num_escaped: int
    tensors: Tensors
    words: slice  # where they stand in the body

    @classmethod
    def of(cls, body: bytes, lengths: np.ndarray, form: Form, has_reference: bool) -> "Head":
        """That of a body; ValueError for one that no encoder makes."""
        head = _HEAD.unpack_from(body)
        scale, num_words, num_lanes, num_escaped, side_bytes, kind, states, even_class = head
        if kind != FORMS.index(form) + 4 * has_reference:
            raise ValueError(f"a body of kind {kind}, expected {form}")
        if states > 8 or (states and 1 << states not in NUM_STATES):
            raise ValueError(f"a trellis of 2^{states} states")
        if not 2.0**-1000 <= scale <= 2.0**1000 or even_class >= NUM_CLASSES:
            raise ValueError(f"a scale of {scale}, a class {even_class}")
        if not 1 <= num_lanes <= MAX_LANES or num_escaped > lengths.sum():
            raise ValueError(f"{num_lanes} lanes, {num_escaped} escaped numbers")
        words = slice(_HEAD.size + side_bytes, _HEAD.size + side_bytes + 2 * num_words)
        if words.stop > len(body):
            raise ValueError(f"{len(body)} bytes, {words.stop} are stated")
        side = body[_HEAD.size : words.start]
        return cls(
            form=form,
            scale=scale,
            num_states=1 << states,
            num_lanes=num_lanes,
            num_escaped=num_escaped,
            tensors=Tensors.from_bytes(side, lengths, form, has_reference, even_class),
            words=words,
        )


def decode_body(
    body: bytes,
    lengths: np.ndarray,
    seed: bytes,
    form: Form,
    reference: np.ndarray | None,
    least_lanes: int,
) -> np.ndarray:
    """The vector (float32) of a body; ValueError for one that no encoder makes.

    Fewer lanes than `least_lanes` are refused: decoding would take many times as long.
    """
    head = Head.of(body, lengths, form, reference is not None)
    if head.num_lanes < least_lanes:
        raise ValueError(f"{head.num_lanes} lanes, expected {least_lanes} or more")
    tensors = head.tensors
    counts, kept = kept_values(lengths, tensors.shares(form), seed)
    plan = plan_of(tensors, counts, head.scale, form, head.num_states)
    words = np.frombuffer(body[head.words], dtype="<u2")
    low, low_bytes = _unpack_low(body[head.words.stop :], plan)
    escaped = unpack_escapes(body[head.words.stop + low_bytes :], head.num_escaped)
    if not plan.num_values:
        if words.size or escaped.size:
            raise ValueError("symbols of no tensor")
        values = np.zeros(int(lengths.sum()), dtype=np.float32)
    else:
        gains = tensors.gains(form, head.num_states)[counts > 0]
        coded = decode_values(
            words.astype(np.uint16), low, escaped, seed, plan, head.num_lanes, gains
        )
        values = coded
        if kept is not None:
            values = np.zeros(kept.size, dtype=np.float32)
            values[kept] = coded
    if reference is not None:
        values += np.repeat(tensors.factor_values(), lengths) * reference
    return values


def tensor_energies(
    decoded: np.ndarray, lengths: np.ndarray, factors: np.ndarray, reference: np.ndarray | None
) -> np.ndarray:
    """Sums of squares (float64) of each tensor without its prediction, a tensor at a time."""
    energies = np.zeros(lengths.size)
    stops = np.cumsum(lengths)
    for index, (start, stop) in enumerate(zip(stops - lengths, stops, strict=True)):
        part = decoded[start:stop]
        if reference is not None:
            part = part - factors[index] * reference[start:stop]
        energies[index] = sum_of_squares(part)
    return energies
