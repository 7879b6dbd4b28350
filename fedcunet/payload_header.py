"""The header of a payload, its checksum, and why a payload is refused.

Nothing in a header is trusted; `payload.py` compares it with what is expected.
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fedcunet.expected import CHECKSUM_BYTES, HEADER_BYTES, OVERHEAD_BYTES, Expected

MAGIC = b"FCUP"
VERSION = 1

# Codecs by number on the wire; a number once given stays.
WIRE_IDS = {
    "float32": 1,
    "float16": 2,
    "linear": 3,
    "linear-nearest": 4,
    "sign": 5,
    "eden": 6,
    "trellis": 7,
    "trellis-wiener": 8,
    "trellis-even": 9,
    "dithered": 10,
    "hadamard-trellis": 11,
    "qsgd": 12,
    "min-max": 13,
    "top-k": 14,
}

# magic, version, codec, fine codec, zero, bits, fine bits (both in 1/256), layout id, run seed,
# round, sender, number of parameters, bytes of the main body, bytes of the fine body.
_HEADER = struct.Struct("<4sBBBBHH8sQIQIII")
assert _HEADER.size == HEADER_BYTES

Reason = Literal[
    "too-short",
    "bad-magic",
    "bad-version",
    "wrong-length",
    "bad-checksum",
    "wrong-layout",
    "wrong-seed",
    "wrong-round",
    "wrong-sender",
    "wrong-codec",
    "wrong-bits",
    "undecodable",
    "not-finite",
    "too-large",
]


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a payload was refused.

    Attributes:
        reason: A short stable word to count by.
        detail: A sentence for people, with what was expected and what came.
    """

    reason: Reason
    detail: str


def checksum(content: bytes | memoryview) -> bytes:
    """Of all that stands before it: BLAKE2b."""
    return hashlib.blake2b(content, digest_size=CHECKSUM_BYTES).digest()


def header_bytes(expected: Expected, main_bytes: int, fine_bytes: int) -> bytes:
    """The header of a payload with bodies of these lengths."""
    return _HEADER.pack(
        MAGIC,
        VERSION,
        WIRE_IDS[expected.codec],
        WIRE_IDS[expected.fine_codec[0]],
        0,
        round(expected.bits * 256),
        round(expected.fine_codec[1] * 256),
        expected.layout.layout_id,
        expected.run_seed,
        expected.round,
        expected.sender,
        expected.layout.num_parameters,
        main_bytes,
        fine_bytes,
    )


class Header(NamedTuple):
    """The header's fields as they came, none of them trusted."""

    magic: bytes
    version: int
    codec_id: int
    fine_codec_id: int
    zero: int
    bits_256ths: int
    fine_bits_256ths: int
    layout_id: bytes
    run_seed: int
    round: int
    sender: int
    num_parameters: int
    main_bytes: int
    fine_bytes: int


def read_header(blob: bytes) -> Header | Rejection:
    """The header of a payload that is whole: of our kind, of its stated length, checksum right."""
    if len(blob) < OVERHEAD_BYTES:
        return Rejection("too-short", f"{len(blob)} bytes, a payload has {OVERHEAD_BYTES} or more")
    header = Header._make(_HEADER.unpack_from(blob))
    if header.magic != MAGIC:
        return Rejection("bad-magic", f"the first bytes are {header.magic!r}, not {MAGIC!r}")
    if header.version != VERSION:
        return Rejection("bad-version", f"version {header.version}, this reads {VERSION}")
    stated = OVERHEAD_BYTES + header.main_bytes + header.fine_bytes
    if len(blob) != stated:
        return Rejection("wrong-length", f"{len(blob)} bytes, the header states {stated}")
    if checksum(memoryview(blob)[:-CHECKSUM_BYTES]) != blob[-CHECKSUM_BYTES:]:
        return Rejection("bad-checksum", "the checksum does not agree with the bytes")
    return header
