"""Mutated payloads against `admit()` and decoding: none may raise, none may take much memory.

    python benchmarks/admit.py [--count N] [--seed S] [--out FILE]

Payloads of every codec are changed at random: bits, bytes, ranges, lengths, fields of the header.
Half of them get the right checksum again, as from a client that means harm. What is admitted of
those is decoded, and its values are checked as the round loop checks them.
"""

import argparse
import hashlib
import json
import os
import resource
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before numpy starts its threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from fedcunet.codecs import CODECS
from fedcunet.expected import Expected
from fedcunet.layout import Layout
from fedcunet.payload import Admitted, Refused, admit, check_values, pack
from fedcunet.payload_header import Rejection, read_header

LAYOUT = Layout.from_tensors(
    {"a.weight": (4, 3, 3, 2), "norm.weight": (8,), "norm.running_var": (8,), "b.weight": (90,)},
    fine={"norm.weight", "norm.running_var"},
)
HEADER_BYTES, CHECKSUM_BYTES = 52, 8
LIMIT = 1e4  # of a value's magnitude and of the norm: the default of the round loop
# Fields of the header: byte offset and struct format.
FIELDS = ((4, "B"), (5, "B"), (6, "B"), (8, "H"), (10, "H"), (20, "Q"), (28, "I"), (32, "Q"),
          (40, "I"), (44, "I"), (48, "I"))  # fmt: skip
SPECIAL = (0, 1, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**32 - 1)


def originals() -> list[tuple[bytes, Expected]]:
    """A good payload of every codec, at its least bits and one more."""
    update = 1e-3 * np.random.default_rng(0).standard_normal(LAYOUT.num_parameters)
    found = []
    for name, codec in CODECS.items():
        for bits in {codec.max_bits, 1 if codec.budget else codec.min_bits}:
            expected = Expected(
                layout=LAYOUT, run_seed=9, round=3, sender=41, codec=name, bits=bits
            )
            found.append((pack(update.astype(np.float32), expected), expected))
    return found


def mutated(blob: bytes, generator: np.random.Generator) -> bytes:
    """`blob` changed in one of seven ways."""
    changed = bytearray(blob)
    size = len(changed)
    start = int(generator.integers(size))
    kind = int(generator.integers(7))
    if kind == 0:
        changed[start] ^= 1 << int(generator.integers(8))
    elif kind == 1:
        for place in generator.integers(0, size, int(generator.integers(1, 9))).tolist():
            changed[place] = int(generator.integers(256))
    elif kind == 2:
        del changed[start:]
    elif kind == 3:
        changed[start:start] = generator.bytes(int(generator.integers(1, 40)))
    elif kind == 4:
        stop = min(size, start + int(generator.integers(1, 60)))
        changed[start:stop] = bytes([int(generator.choice([0, 255]))]) * (stop - start)
    elif kind == 5:
        offset, form = FIELDS[int(generator.integers(len(FIELDS)))]
        value = int(generator.choice(SPECIAL)) % 2 ** (8 * struct.calcsize(form))
        struct.pack_into("<" + form, changed, offset, value)
    else:
        # Of the bodies alone: these get farthest.
        for _ in range(int(generator.integers(1, 5))):
            place = int(generator.integers(HEADER_BYTES, size - CHECKSUM_BYTES))
            changed[place] = int(generator.integers(256))
    return bytes(changed)


def with_checksum(blob: bytes) -> bytes:
    """`blob` with its last 8 bytes made the checksum of what stands before."""
    content = blob[:-CHECKSUM_BYTES]
    return content + hashlib.blake2b(content, digest_size=CHECKSUM_BYTES).digest()


def outcome_of(blob: bytes, expected: Expected) -> str:
    """What becomes of a payload: `accepted`, or a reason. Whatever it raises is a failure."""
    answer = admit(blob, expected)
    if isinstance(answer, Rejection):
        return answer.reason
    assert isinstance(answer, Admitted)
    # Independently of admit(): every field of the header is that of the good payload.
    header, good = read_header(blob), read_header(pack_again(expected))
    assert not isinstance(header, Rejection)
    assert not isinstance(good, Rejection)
    assert header[:-2] == good[:-2]
    assert len(blob) == HEADER_BYTES + CHECKSUM_BYTES + header.main_bytes + header.fine_bytes
    try:
        values = answer.decode()
    except Refused as error:
        return error.rejection.reason
    assert values.shape == (LAYOUT.num_parameters,)
    refused = check_values(values, limit=LIMIT, norm_limit=LIMIT)
    return "accepted" if refused is None else refused.reason


_good: dict[tuple[str, float], bytes] = {}


def pack_again(expected: Expected) -> bytes:
    """The good payload of those terms, made once."""
    key = (expected.codec, expected.bits)
    if key not in _good:
        _good[key] = pack(np.zeros(LAYOUT.num_parameters, dtype=np.float32), expected)
    return _good[key]


def run(
    count: int, seed: int, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Outcomes of `count` mutations; every second one has its checksum made right again."""
    generator = np.random.default_rng(seed)
    payloads = originals()
    plain: Counter[str] = Counter()
    repaired: Counter[str] = Counter()
    for blob, expected in payloads:
        assert outcome_of(blob, expected) == "accepted"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    for number in range(count):
        blob, expected = payloads[int(generator.integers(len(payloads)))]
        changed = mutated(blob, generator)
        if number % 2 and len(changed) > CHECKSUM_BYTES:
            changed = with_checksum(changed)
        if changed == blob:
            continue
        (repaired if number % 2 else plain)[outcome_of(changed, expected)] += 1
        progress(number + 1)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "count": count,
        "seed": seed,
        "payloads": len(payloads),
        "checksum_left": dict(plain.most_common()),
        "checksum_made_right": dict(repaired.most_common()),
        "peak_memory_growth_bytes": grown * 1024,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="number of mutations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    text = json.dumps(run(arguments.count, arguments.seed), indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
